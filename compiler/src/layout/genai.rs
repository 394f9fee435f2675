//! onnxruntime-genai (0.18): `genai_config.json`, graphs for its `MultiModalLanguageModel`, and pictures prepared by
//! onnxruntime-extensions. Qwen2-VL and Qwen2.5-VL are its type `qwen2_5_vl`, positions included. Models that take only embeddings
//! are its type `phi3v`, for which the caller prepares pictures and prompt.
//!
//! Source of names and types: onnxruntime-genai `src/config.h`, `src/models/multi_modal.cpp`, `src/models/position_inputs.cpp`.

use super::{Cache, Files, Layout, decimals, flat, interface, pretty, text_config, tokenizer_config};
use crate::{Error, Result, compile::Model};
use serde_json::{Value, json};
use vlmc_artifact::{Entry, Manifest, Positions, Processor, PromptRules, Qwen2VlProcessor, Resample, Task};
use vlmc_ir::{BuildError, Program};

pub(super) static LAYOUT: Layout = Layout {
    name: "genai",
    summary: "onnxruntime-genai 0.18",
    architectures: &["qwen2_vl", "qwen2_5_vl", "llava", "multi_modality", "deepseek_vl", "deepseek_vl_hybrid", "deepseek_vl_v2", "qwen"],
    targets: &["onnx-cpu", "onnx-cuda"],
    symbols: &[],
    adapt,
    place: |g| flat(&g.name),
    files,
};

/// File of the steps that prepare pictures, in the format of onnxruntime-extensions.
const PROCESSOR: &str = "processor_config.json";

fn adapt(program: Program, task: &Task) -> Result<Program, BuildError> {
    let token = task.prompt().and_then(|rules| rules.image_token_id);
    let graphs = program.graphs.iter().map(|g| match g.name.as_str() {
        // The client knows pictures by this name; other inputs it passes on under theirs.
        "vision" => interface::vision(g, |name| if name == "images" { "pixel_values" } else { name }),
        "embed" => interface::embed(g, token),
        _ => interface::values_as_wide_as_keys(&interface::decoder(g)?),
    });
    let graphs = graphs.collect::<Result<_, _>>()?;
    Ok(interface::with_graphs(program, graphs))
}

fn files(model: &Model, manifest: &Manifest) -> Result<Files> {
    let rules = manifest.task.prompt().ok_or_else(|| refused("a model without prompts"))?;
    let native = matches!(rules.positions, Positions::Mrope { .. });
    let mut files = vec![
        ("genai_config.json".into(), pretty(&config(model, manifest, rules)?)),
        ("tokenizer_config.json".into(), pretty(&tokenizer(model, manifest, native)?)),
        ("README.md".into(), readme(manifest, native).into_bytes()),
    ];
    match &manifest.processor {
        Some(Processor::Qwen2Vl(p)) if native => files.push((PROCESSOR.into(), pretty(&processor(p)?))),
        None if native => return Err(refused("a checkpoint without preprocessor_config.json")),
        _ => {}
    }
    if !model.checkpoint().dir().join("tokenizer.json").exists() && rules.template.is_none() {
        return Err(refused("a checkpoint without tokenizer.json"));
    }
    Ok(files)
}

fn refused(what: &str) -> Error {
    Error::Layout {
        layout: LAYOUT.name,
        what: what.into(),
        supported: "checkpoints of chat models, with their tokenizer and processor".into(),
    }
}

/// `genai_config.json`. Keys that the client does not know are errors there.
fn config(model: &Model, manifest: &Manifest, rules: &PromptRules) -> Result<Value> {
    let config = model.checkpoint().config();
    let text = text_config(config);
    let cache = Cache::of(manifest, "decoder").ok_or_else(|| refused("a decoder without a cache"))?;
    let token = |name: &str| config.get(name).or_else(|| text.get(name)).and_then(Value::as_i64);
    let options = json!({"log_id": "onnxruntime-genai", "provider_options": providers(&manifest.target)});
    let heads = text.get("num_attention_heads").and_then(Value::as_i64).unwrap_or(rules.hidden_size as i64 / cache.width.max(1));
    let inputs =
        |name: &str| entry(manifest, name).into_iter().flat_map(|e| &e.inputs).map(|p| (p.name.clone(), Value::from(p.name.clone())));
    let mut decoder_inputs: serde_json::Map<String, Value> = inputs("decoder").collect();
    decoder_inputs.extend([
        ("past_key_names".to_string(), json!("past_key_values.%d.key")),
        ("past_value_names".to_string(), json!("past_key_values.%d.value")),
    ]);
    // Inputs that the client has no key for are passed on by name.
    let known = ["pixel_values", "image_grid_thw"];
    let vision_inputs: serde_json::Map<String, Value> = inputs("vision").filter(|(n, _)| known.contains(&n.as_str())).collect();
    let mut vision = json!({
        "filename": "vision.onnx",
        "inputs": vision_inputs,
        "outputs": {"image_features": "image_features"},
        "session_options": options,
    });
    let (name, context) = match &rules.positions {
        Positions::Mrope { spatial_merge_size, tokens_per_second, .. } => {
            vision["config_filename"] = PROCESSOR.into();
            vision["spatial_merge_size"] = (*spatial_merge_size).into();
            vision["tokens_per_second"] = tokens_per_second.unwrap_or(1.0).into();
            if let Some(Processor::Qwen2Vl(p)) = &manifest.processor {
                vision["patch_size"] = p.patch_size.into();
            }
            if let Some(window) = config.get("vision_config").and_then(|v| v.get("window_size")) {
                vision["window_size"] = window.clone();
            }
            ("qwen2_5_vl", rules.max_positions)
        }
        Positions::Sequential => ("phi3v", rules.max_positions),
        // Longer prompts turn by other frequencies, which the client cannot tell the graph to use.
        Positions::Absolute { trained, .. } => ("phi3v", rules.max_positions.min(*trained)),
    };
    let generation = &manifest.generation;
    let mut out = json!({
        "model": {
            "type": name,
            "eos_token_id": generation.eos_token_ids,
            "pad_token_id": generation.pad_token_id.or(generation.eos_token_ids.first().copied()).unwrap_or(0),
            "vocab_size": rules.vocab_size,
            "context_length": context,
            "decoder": {
                "filename": "decoder.onnx",
                "session_options": options,
                "head_size": cache.width,
                "hidden_size": rules.hidden_size,
                "num_attention_heads": heads,
                "num_hidden_layers": cache.layers,
                "num_key_value_heads": cache.heads,
                "inputs": decoder_inputs,
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
            },
            "embedding": {
                "filename": "embed.onnx",
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
                "session_options": options,
            },
            "vision": vision,
        },
        "search": {
            "do_sample": generation.do_sample,
            "max_length": context,
            "num_beams": 1,
            "past_present_share_buffer": shares_cache(manifest),
            "repetition_penalty": generation.repetition_penalty,
            "temperature": generation.temperature,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
        },
    });
    let ids = [
        ("bos_token_id", token("bos_token_id")),
        ("image_token_id", rules.image_token_id),
        ("video_token_id", rules.video_token_id),
        ("vision_start_token_id", token("vision_start_token_id")),
    ];
    for (key, id) in ids {
        if let Some(id) = id {
            out["model"][key] = id.into();
        }
    }
    Ok(out)
}

/// Whether the client may keep the cache in one buffer of `max_length` positions instead of copying it for each token. On GPUs it may
/// give a mask as long as the buffer then, and graphs count positions by the mask.
fn shares_cache(manifest: &Manifest) -> bool {
    manifest.target == "onnx-cpu" && entry(manifest, "decoder").is_some_and(|e| e.states.iter().all(|s| s.in_place))
}

fn entry<'m>(manifest: &'m Manifest, name: &str) -> Option<&'m Entry> {
    manifest.entries.iter().find(|e| e.name == name)
}

/// Execution providers of a target's graphs, beside the CPU.
fn providers(target: &str) -> Value {
    if target == "onnx-cuda" { json!([{"cuda": {"enable_cuda_graph": "0"}}]) } else { json!([]) }
}

/// The tokenizer's settings, with the name of a class that onnxruntime-extensions knows.
fn tokenizer(model: &Model, manifest: &Manifest, native: bool) -> Result<Value> {
    let mut config = tokenizer_config(model, manifest)?;
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    if !["Qwen2Tokenizer", "LlamaTokenizer"].contains(&class.trim_end_matches("Fast")) {
        config["tokenizer_class"] = if native { "Qwen2Tokenizer" } else { "LlamaTokenizer" }.into();
    }
    Ok(config)
}

/// The steps of `Qwen2VLImageProcessor` in the format of onnxruntime-extensions.
fn processor(p: &Qwen2VlProcessor) -> Result<Value> {
    let step = |name: &str, attrs: Value| json!({"operation": {"name": name, "type": name, "attrs": attrs}});
    let interpolation = match p.resample {
        Resample::Bilinear => "LINEAR",
        Resample::Bicubic => "CUBIC",
        Resample::Lanczos => "LANCZOS",
    };
    let resize = json!({
        // A size that smart_resize replaces.
        "width": p.patch_size * p.merge_size,
        "height": p.patch_size * p.merge_size,
        "interpolation": interpolation,
        "smart_resize": 1,
        "min_pixels": p.min_pixels,
        "max_pixels": p.max_pixels,
        "patch_size": p.patch_size,
        "merge_size": p.merge_size,
    });
    let patches = json!({"patch_size": p.patch_size, "temporal_patch_size": p.temporal_patch_size, "merge_size": p.merge_size});
    Ok(json!({"processor": {"name": "qwen2_5_image_processor", "transforms": [
        step("DecodeImage", json!({"color_space": "RGB"})),
        step("ConvertRGB", json!({})),
        step("Resize", resize),
        step("Rescale", json!({"rescale_factor": p.rescale_factor})),
        step("Normalize", json!({"mean": decimals(&p.image_mean), "std": decimals(&p.image_std), "qwen2_5_vl": 1})),
        step("PatchImage", patches),
    ]}}))
}

fn readme(manifest: &Manifest, native: bool) -> String {
    let head = format!(
        "# {} for onnxruntime-genai\n\nMade by {} for `{}`. Load the directory with onnxruntime-genai 0.18 or later:\n\n```python\nimport onnxruntime_genai as og\n\nmodel = og.Model(\"DIRECTORY\")\n",
        manifest.architecture, manifest.compiler, manifest.target
    );
    let rest = if native {
        "processor = model.create_multimodal_processor()
prompt = \"<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\\n<|im_start|>assistant\\n\"
inputs = processor(prompt, images=og.Images.open(\"a.png\"))   # images=None for text alone

params = og.GeneratorParams(model)
params.set_search_options(max_length=4096)   # tokens of prompt and answer, for which memory is taken
generator = og.Generator(model, params)
generator.set_inputs(inputs)
stream = processor.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end=\"\")
```

A picture is one `<|vision_start|><|image_pad|><|vision_end|>` of the prompt. Videos are not prepared by this client.
"
        .to_string()
    } else {
        let inputs: String = entry(manifest, "vision")
            .into_iter()
            .flat_map(|e| &e.inputs)
            .map(|p| format!("- `{}`: {}[{}]\n", p.name, p.dtype, p.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")))
            .collect();
        format!(
            "inputs = og.NamedTensors()
inputs[\"input_ids\"] = ids                  # int32[1, n], with the picture's token once per feature
inputs[\"pixel_values\"] = pixels            # float32, as the model's own processor makes them
inputs[\"num_image_tokens\"] = np.array([n_features])

params = og.GeneratorParams(model)
params.set_search_options(max_length=4096)   # tokens of prompt and answer, for which memory is taken
generator = og.Generator(model, params)
generator.set_inputs(inputs)
while not generator.is_done():
    generator.generate_next_token()
    token = generator.get_next_tokens()[0]
```

The client has no preprocessing of this model: the caller prepares pictures and tokens. Inputs of the vision graph, all of which go
into `NamedTensors` under these names (`feature_positions`, if it is among them: 0, 1, 2, one for each feature):

{inputs}"
        )
    };
    head + &rest
}
