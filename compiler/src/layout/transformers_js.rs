//! transformers.js (4.3): files of a model as on the Hugging Face hub, with graphs in `onnx/`.
//!
//! Source of names: `src/models/session_config.js`, `src/utils/dtypes.js`, `src/utils/model-loader.js` and `src/models/*` of
//! `@huggingface/transformers`.

use super::{Cache, Files, Layout, Place, decimals, interface, pretty, text_config, tokenizer_config};
use crate::{Error, Result, compile::Model};
use serde_json::{Map, Value, json};
use vlmc_artifact::{Manifest, Processor, Resample, Resize, Task};
use vlmc_ir::{BuildError, DType, Def, Graph, Program};

pub(super) static LAYOUT: Layout = Layout {
    name: "transformers-js",
    summary: "transformers.js 4.3, in Node and browsers",
    architectures: &["qwen2_vl", "qwen2_5_vl", "llava", "clip", "siglip", "vit"],
    targets: &["onnx-cpu", "onnx-cuda"],
    // The client makes an empty cache by this name.
    symbols: &[("batch", "batch_size")],
    adapt,
    place,
    files,
};

const DECODER: &str = "decoder_model_merged";

/// What the client calls types of graphs, and what their file names end with, by the weights: of 4 bits, 8 bits, f16, f32.
const DTYPES: [(&str, &str); 5] = [("q4f16", "_q4f16"), ("q4", "_q4"), ("q8", "_quantized"), ("fp16", "_fp16"), ("fp32", "")];

fn adapt(program: Program, task: &Task) -> Result<Program, BuildError> {
    let qwen2 = program.name == "qwen2_vl";
    let named = |graph: Result<Graph, BuildError>, name: &str| {
        graph.map(|mut g| {
            g.name = name.into();
            g
        })
    };
    let sigmoid = matches!(task, Task::Contrast(rules) if rules.sigmoid);
    let pooled = [("vision_pooler_output", "pooler_output"), ("text_pooler_output", "pooler_output")];
    let embeds = [("image_embeds", "image_embeds"), ("text_embeds", "text_embeds")];
    let tower = |g: &Graph| interface::with_outputs(g, if sigmoid { &pooled } else { &embeds });
    let mut graphs = vec![];
    // The tokenizer of SigLIP gives no mask: padding is seen, as in training.
    let texts: Vec<Graph> =
        program.graphs.iter().map(|g| if sigmoid { interface::without_mask(g) } else { Ok(g.clone()) }).collect::<Result<_, _>>()?;
    for g in &texts {
        graphs.push(match g.name.as_str() {
            "vision" => named(
                interface::vision(g, if qwen2 { |name| if name == "image_grid_thw" { "grid_thw" } else { name } } else { |name| name }),
                "vision_encoder",
            )?,
            "embed" => named(interface::embed_tokens(g), "embed_tokens")?,
            "decoder" => named(interface::decoder(g), DECODER)?,
            "image" => named(tower(g), "vision_model")?,
            "text" => named(tower(g), "text_model")?,
            "classify" => named(interface::with_outputs(g, &[("logits", "logits")]), "model")?,
            // Pairs: both towers and their scores.
            "score" => {
                let scores = [("logits_per_image", "logits_per_image"), ("logits_per_text", "logits_per_text")];
                let all: Vec<&Graph> = texts.iter().filter(|g| ["image", "text", "score"].contains(&g.name.as_str())).collect();
                interface::with_outputs(&interface::joined("model", &all)?, &[&scores[..], &embeds].concat())?
            }
            _ => continue,
        });
    }
    Ok(interface::with_graphs(program, graphs))
}

fn place(graph: &Graph) -> Place {
    let onnx = format!("onnx/{}{}.onnx", graph.name, suffix(graph));
    Place { weights: format!("{onnx}_data"), onnx }
}

/// End of the name of a graph's file.
fn suffix(graph: &Graph) -> &'static str {
    let weights: Vec<DType> = graph.values().filter(|(_, _, def)| matches!(def, Def::Weight(_))).map(|(_, ty, _)| ty.dtype).collect();
    let bits = |bits: u8| weights.iter().any(|d| d.scheme().is_some_and(|s| s.bits == bits));
    let half = weights.iter().any(|d| matches!(d, DType::F16 | DType::BF16));
    let dtype = match (bits(4), bits(8), half) {
        (true, _, true) => "q4f16",
        (true, _, false) => "q4",
        (false, true, _) => "q8",
        (false, false, true) => "fp16",
        (false, false, false) => "fp32",
    };
    DTYPES.iter().find(|(name, _)| *name == dtype).map_or("", |(_, suffix)| suffix)
}

fn files(model: &Model, manifest: &Manifest) -> Result<Files> {
    let mut files = vec![("config.json".into(), pretty(&config(model, manifest))), ("README.md".into(), readme(manifest).into_bytes())];
    if let Some(preprocessor) = preprocessor(manifest)? {
        files.push(("preprocessor_config.json".into(), pretty(&preprocessor)));
    }
    if let (Some(rules), Some(Processor::Standard(p))) = (manifest.task.prompt(), &manifest.processor) {
        let tokenizer = model.side_files()?;
        let token = rules.image_token_id.and_then(|id| tokenizer.token(id));
        let config = model.checkpoint().config();
        let patch = config["vision_config"]["patch_size"].as_u64().unwrap_or(14) as usize;
        let patches = p.crop.map_or(0, |c| (c.height / patch) * (c.width / patch));
        let processor = json!({
            "processor_class": "LlavaProcessor",
            "image_token": token.unwrap_or_else(|| "<image>".into()),
            "patch_size": patch,
            // Tokens of a picture beyond its patches; the client leaves none out.
            "num_additional_image_tokens": p.tokens as i64 - patches as i64,
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        });
        files.push(("processor_config.json".into(), pretty(&processor)));
    }
    if !matches!(manifest.task, Task::Classify { .. }) {
        files.push(("tokenizer_config.json".into(), pretty(&tokenizer_config(model, manifest)?)));
    }
    if let Some(generation) = model.checkpoint().json("generation_config.json")? {
        files.push(("generation_config.json".into(), pretty(&generation)));
    }
    Ok(files)
}

/// `config.json` as the client reads it: of Qwen2-VL flat, of the others with a part for the decoder.
fn config(model: &Model, manifest: &Manifest) -> Value {
    let mut config = model.checkpoint().config().clone();
    let mut text = text_config(&config).as_object().cloned().unwrap_or_default();
    if let (Some(rules), Some(cache)) = (manifest.task.prompt(), Cache::of(manifest, DECODER)) {
        // What the config leaves to the defaults of its class.
        let sizes = [
            ("num_hidden_layers", cache.layers as i64),
            ("num_key_value_heads", cache.heads),
            ("num_attention_heads", rules.hidden_size as i64 / cache.width.max(1)),
            ("hidden_size", rules.hidden_size as i64),
            ("head_dim", cache.width),
        ];
        for (field, size) in sizes {
            text.entry(field).or_insert(size.into());
        }
        match manifest.architecture.as_str() {
            "qwen2_vl" => {
                text.remove("model_type");
                text.remove("text_config");
                let all = config.as_object_mut().map(std::mem::take).unwrap_or_default();
                let rest = all.into_iter().filter(|(name, _)| name != "text_config");
                // The config's own fields win.
                let flat: Map<String, Value> = text.into_iter().chain(rest).collect();
                config = flat.into();
            }
            "qwen2_5_vl" => {
                for field in ["architectures", "vision_config", "transformers_version"] {
                    text.remove(field);
                }
                text.insert("model_type".into(), "qwen2_5_vl_text".into());
                config["text_config"] = text.into();
            }
            _ => config["text_config"] = text.into(),
        }
    }
    let mut dtypes = Map::new();
    let mut data = Map::new();
    for e in &manifest.entries {
        let file = e.file.trim_start_matches("onnx/");
        let suffix = file.trim_start_matches(e.name.as_str()).trim_end_matches(".onnx");
        let dtype = DTYPES.iter().find(|(_, s)| *s == suffix).map_or("fp32", |(name, _)| name);
        dtypes.insert(e.name.clone(), dtype.into());
        data.insert(file.into(), 1.into());
    }
    config["transformers.js_config"] = json!({"dtype": dtypes, "use_external_data_format": data});
    config
}

/// `preprocessor_config.json`, with all that the client would take from a class's defaults.
fn preprocessor(manifest: &Manifest) -> Result<Option<Value>> {
    let class = match manifest.architecture.as_str() {
        "qwen2_vl" | "qwen2_5_vl" => "Qwen2VLImageProcessor",
        "siglip" => "SiglipImageProcessor",
        "vit" => "ViTImageProcessor",
        _ => "CLIPImageProcessor",
    };
    let processor_class = match manifest.architecture.as_str() {
        "qwen2_vl" => Some("Qwen2VLProcessor"),
        "qwen2_5_vl" => Some("Qwen2_5_VLProcessor"),
        "llava" => Some("LlavaProcessor"),
        _ => None,
    };
    // Pillow's numbers.
    let filter = |resample: Resample| match resample {
        Resample::Lanczos => 1,
        Resample::Bilinear => 2,
        Resample::Bicubic => 3,
    };
    let mut out = match &manifest.processor {
        None => return Ok(None),
        Some(Processor::Qwen2Vl(p)) => json!({
            "do_resize": true,
            "size": {"shortest_edge": p.min_pixels, "longest_edge": p.max_pixels},
            "min_pixels": p.min_pixels,
            "max_pixels": p.max_pixels,
            "patch_size": p.patch_size,
            "temporal_patch_size": p.temporal_patch_size,
            "merge_size": p.merge_size,
            "image_mean": decimals(&p.image_mean),
            "image_std": decimals(&p.image_std),
            "rescale_factor": p.rescale_factor,
            "resample": filter(p.resample),
        }),
        Some(Processor::Standard(p)) => {
            let mut out = json!({
                "do_resize": p.resize.is_some(),
                "do_center_crop": p.crop.is_some(),
                "image_mean": decimals(&p.image_mean),
                "image_std": decimals(&p.image_std),
                "rescale_factor": p.rescale_factor,
                "resample": filter(p.resample),
            });
            match p.resize {
                Some(Resize::Exact { height, width }) => out["size"] = json!({"height": height, "width": width}),
                Some(Resize::ShortestEdge { edge }) => out["size"] = json!({"shortest_edge": edge}),
                None => {}
            }
            if let Some(crop) = p.crop {
                out["crop_size"] = json!({"height": crop.height, "width": crop.width});
            }
            out
        }
        Some(_) => {
            let what = "its way to prepare pictures".into();
            return Err(Error::Layout { layout: LAYOUT.name, what, supported: "those of Qwen2-VL, LLaVA, CLIP, SigLIP and ViT".into() });
        }
    };
    for flag in ["do_rescale", "do_normalize", "do_convert_rgb"] {
        out[flag] = true.into();
    }
    out["image_processor_type"] = class.into();
    if let Some(name) = processor_class {
        out["processor_class"] = name.into();
    }
    Ok(Some(out))
}

fn readme(manifest: &Manifest) -> String {
    let head = format!(
        "# {} for transformers.js\n\nMade by {} for `{}`. Put the directory where `env.localModelPath` points to, or on a server, and load it by its name
with `@huggingface/transformers` 4.3 or later:

```js
import {{ env, AutoProcessor, AutoTokenizer, {}, RawImage }} from '@huggingface/transformers';
env.localModelPath = 'PARENT-OF-DIRECTORY/';
",
        manifest.architecture,
        manifest.compiler,
        manifest.target,
        match manifest.task {
            Task::Generate(_) => "AutoModelForImageTextToText",
            Task::Contrast(_) => "AutoModel",
            Task::Classify { .. } => "AutoModelForImageClassification",
        }
    );
    let body = match manifest.task {
        Task::Generate(_) => {
            let call = if manifest.architecture == "llava" { "processor(image, prompt)" } else { "processor(prompt, image)" };
            format!(
                "const processor = await AutoProcessor.from_pretrained('DIRECTORY');
const model = await AutoModelForImageTextToText.from_pretrained('DIRECTORY');
const image = await RawImage.read('a.png');
const messages = [{{ role: 'user', content: [{{ type: 'image' }}, {{ type: 'text', text: 'What is this?' }}] }}];
const prompt = processor.apply_chat_template(messages, {{ add_generation_prompt: true }});
const inputs = await {call};
const out = await model.generate({{ ...inputs, max_new_tokens: 64 }});
console.log(processor.batch_decode(out.slice(null, [inputs.input_ids.dims.at(-1), null]), {{ skip_special_tokens: true }})[0]);
"
            )
        }
        Task::Contrast(_) => "const processor = await AutoProcessor.from_pretrained('DIRECTORY');
const tokenizer = await AutoTokenizer.from_pretrained('DIRECTORY');
const model = await AutoModel.from_pretrained('DIRECTORY');
const texts = tokenizer(['a cat', 'a dog'], { padding: 'max_length', truncation: true });
const { logits_per_image } = await model({ ...texts, ...await processor(await RawImage.read('a.png')) });
console.log(logits_per_image.tolist());
"
        .into(),
        Task::Classify { .. } => "const processor = await AutoProcessor.from_pretrained('DIRECTORY');
const model = await AutoModelForImageClassification.from_pretrained('DIRECTORY');
const { logits } = await model(await processor(await RawImage.read('a.png')));
console.log(logits.tolist());
"
        .into(),
    };
    let tail = "```

Types of weights and external data are told to the client by `transformers.js_config` in `config.json`. The `.onnx_data` files are
safetensors.
";
    head + &body + tail
}
