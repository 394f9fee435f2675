//! Triton Inference Server: a model repository with each graph as a model of its onnxruntime backend and, for models that answer
//! prompts, the model `generate` of its Python backend, which runs the graphs in turn and streams tokens. That one opens the graphs
//! itself, because a cache that grows with each token should not travel through the server; so it also runs in servers that have no
//! onnxruntime backend.

use super::{Files, Layout, Place, interface, pretty};
use crate::{Result, compile::Model};
use serde_json::{Value, json};
use std::fmt::Write;
use vlmc_artifact::{DType, Dim, Entry, Manifest, Port, Positions, PromptRules, Task};
use vlmc_ir::{BuildError, Graph, Program};

pub(super) static LAYOUT: Layout = Layout {
    name: "triton",
    summary: "model repository of Triton Inference Server",
    architectures: &[
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen",
        "llava",
        "multi_modality",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "deepseek_vl_v2",
        "clip",
        "clip_openai",
        "siglip",
        "siglip2",
        "vit",
    ],
    targets: &["onnx-cpu", "onnx-cuda"],
    symbols: &[],
    adapt,
    place: |g| Place { onnx: format!("{}/1/model.onnx", g.name), weights: format!("{}/1/{}", g.name, crate::compile::WEIGHTS) },
    files,
};

/// The model that answers prompts.
const GENERATE: &str = "generate";

fn adapt(program: Program, task: &Task) -> Result<Program, BuildError> {
    let token = task.prompt().and_then(|rules| rules.image_token_id);
    let graphs = program.graphs.iter().map(|g: &Graph| match g.name.as_str() {
        "vision" => interface::vision(g, |name| name),
        "embed" => interface::embed(g, token),
        "decoder" => interface::decoder(g),
        _ => Ok(g.clone()),
    });
    let graphs = graphs.collect::<Result<_, _>>()?;
    Ok(interface::with_graphs(program, graphs))
}

fn files(_: &Model, manifest: &Manifest) -> Result<Files> {
    let mut files: Files =
        manifest.entries.iter().map(|e| (format!("{}/config.pbtxt", e.name), graph_config(e, &manifest.target).into_bytes())).collect();
    if let Some(rules) = manifest.task.prompt() {
        files.push((format!("{GENERATE}/config.pbtxt"), generate_config(manifest).into_bytes()));
        files.push((format!("{GENERATE}/1/model.py"), include_bytes!("model.py").to_vec()));
        files.push((format!("{GENERATE}/1/model.json"), pretty(&settings(manifest, rules))));
    }
    files.push(("README.md".into(), readme(manifest).into_bytes()));
    Ok(files)
}

fn tensor(kind: &str, name: &str, dtype: DType, shape: &[Dim], optional: bool) -> String {
    let dtype = match dtype {
        DType::Bool => "TYPE_BOOL",
        DType::U8 | DType::Quant(_) => "TYPE_UINT8",
        DType::I8 => "TYPE_INT8",
        DType::I32 => "TYPE_INT32",
        DType::I64 => "TYPE_INT64",
        DType::F16 => "TYPE_FP16",
        DType::BF16 => "TYPE_BF16",
        DType::F32 => "TYPE_FP32",
    };
    let dims: Vec<String> = shape.iter().map(|d| d.as_const().unwrap_or(-1).to_string()).collect();
    let optional = if optional { "  optional: true\n" } else { "" };
    format!("{kind} {{\n  name: \"{name}\"\n  data_type: {dtype}\n  dims: [ {} ]\n{optional}}}\n", dims.join(", "))
}

/// Of the onnxruntime backend. The graphs have their own batch axes, so the server adds none.
fn graph_config(e: &Entry, target: &str) -> String {
    let kind = if target == "onnx-cuda" { "KIND_GPU" } else { "KIND_CPU" };
    let mut out = format!("name: \"{}\"\nbackend: \"onnxruntime\"\nmax_batch_size: 0\ninstance_group {{ kind: {kind} }}\n", e.name);
    let port = |kind: &str, p: &Port| tensor(kind, &p.name, p.dtype, &p.shape, false);
    out.extend(e.inputs.iter().map(|p| port("input", p)));
    out.extend(e.states.iter().map(|s| tensor("input", &s.past, s.dtype, &s.shape, false)));
    out.extend(e.outputs.iter().map(|p| port("output", p)));
    out.extend(e.states.iter().map(|s| {
        let mut shape = s.shape.clone();
        if let Some(axis) = shape.get_mut(s.axis) {
            *axis = Dim::symbol("present");
        }
        tensor("output", &s.present, s.dtype, &shape, false)
    }));
    out
}

/// What the caller gives of a picture, which it may do without.
fn picture_inputs(manifest: &Manifest) -> impl Iterator<Item = &Port> {
    let vision = manifest.entries.iter().find(|e| e.name == "vision");
    vision.into_iter().flat_map(|e| &e.inputs).filter(|p| p.name != "feature_positions")
}

fn generate_config(manifest: &Manifest) -> String {
    let mut out = format!(
        "name: \"{GENERATE}\"\nbackend: \"python\"\nmax_batch_size: 0\nmodel_transaction_policy {{ decoupled: true }}\ninstance_group {{ kind: KIND_CPU }}\n"
    );
    let any = [Dim::symbol("any")];
    out += &tensor("input", "input_ids", DType::I64, &any, false);
    out.extend(picture_inputs(manifest).map(|p| tensor("input", &p.name, p.dtype, &p.shape, true)));
    out += &tensor("input", "max_new_tokens", DType::I64, &[1.into()], true);
    out += &tensor("output", "token_id", DType::I64, &[1.into()], false);
    out
}

/// What `model.py` must know.
fn settings(manifest: &Manifest, rules: &PromptRules) -> Value {
    let merge = if let Positions::Mrope { spatial_merge_size, .. } = &rules.positions { Some(*spatial_merge_size) } else { None };
    // Longer prompts than those of the training turn by other frequencies, which the graph is not told of.
    let context = match &rules.positions {
        Positions::Absolute { trained, .. } => rules.max_positions.min(*trained),
        _ => rules.max_positions,
    };
    json!({
        "graphs": manifest.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(),
        "providers": if manifest.target == "onnx-cuda" { json!(["CUDAExecutionProvider", "CPUExecutionProvider"]) } else { json!(["CPUExecutionProvider"]) },
        "picture_inputs": picture_inputs(manifest).map(|p| p.name.as_str()).collect::<Vec<_>>(),
        "image_token_id": rules.image_token_id,
        "eos_token_ids": manifest.generation.eos_token_ids,
        "spatial_merge_size": merge,
        "context_length": context,
    })
}

fn readme(manifest: &Manifest) -> String {
    let mut out = format!(
        "# {} for Triton Inference Server\n\nA model repository, made by {} for `{}`. Each graph is a model of the onnxruntime backend:\n\n",
        manifest.architecture, manifest.compiler, manifest.target
    );
    for e in &manifest.entries {
        let names = |ports: &[Port]| ports.iter().map(|p| format!("`{}`", p.name)).collect::<Vec<_>>().join(", ");
        let _ = writeln!(out, "- `{}`: {} to {}", e.name, names(&e.inputs), names(&e.outputs));
    }
    if manifest.task.prompt().is_none() {
        out += "\n```sh\ntritonserver --model-repository=DIRECTORY\n```\n";
        return out;
    }
    let pictures: Vec<String> = picture_inputs(manifest).map(|p| format!("`{}`", p.name)).collect();
    let _ = write!(
        out,
        "
`{GENERATE}` is a decoupled model of the Python backend, which runs the graphs with ONNX Runtime (`pip install onnxruntime numpy` in the
server's Python) and streams tokens, the most probable ones. It needs no onnxruntime backend:

```sh
tritonserver --model-repository=DIRECTORY --model-control-mode=explicit --load-model={GENERATE}
```

Inputs: `input_ids` (one prompt, with the picture's token once per feature), {}, all of them or none, as the model's Hugging Face
processor makes them, and `max_new_tokens`. Output: `token_id`, one response a token. `tokenizer.json` in this directory turns text
into tokens and back.

```python
import tritonclient.grpc as triton

client = triton.InferenceServerClient(\"localhost:8001\")
client.start_stream(lambda result, error: print(error or result.as_numpy(\"token_id\")))
ids = triton.InferInput(\"input_ids\", [len(prompt)], \"INT64\")
ids.set_data_from_numpy(prompt)
client.async_stream_infer(\"{GENERATE}\", [ids], enable_empty_final_response=True)
```
",
        pictures.join(", ")
    );
    out
}
