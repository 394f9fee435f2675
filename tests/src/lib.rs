//! What the end-to-end tests share: fixtures, goldens, comparisons.

pub mod quantization;

use half::{bf16, f16};
use ndarray::{ArrayD, Axis, IxDyn};
use safetensors::{Dtype, SafeTensors};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use vlmc::compile::{Model, Options};
use vlmc_ir::{DType, interp::Array};
use vlmc_passes::{Target, quantize::Policy};
use vlmc_runtime::{Artifact, EngineOptions, Part, Provider, artifact::Processor, open_engine, processor};

/// Artifacts of all targets run on the processor.
pub const CPU: EngineOptions =
    EngineOptions { threads: None, provider: Some(Provider::Cpu), engine_cache: None, large_pages: true, progress: |_| {} };

/// A directory of `fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

/// All tensors of a safetensors file; floats as `f32`, other numbers as `i64`.
pub fn load(path: &Path) -> BTreeMap<String, Array> {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    fn map<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
    }
    let array = |t: &safetensors::tensor::TensorView<'_>| {
        let shape = IxDyn(t.shape());
        let floats = |v: Vec<f32>| Array::F32(ArrayD::from_shape_vec(shape.clone(), v).expect("the file's shape"));
        let ints = |v: Vec<i64>| Array::I64(ArrayD::from_shape_vec(shape.clone(), v).expect("the file's shape"));
        match t.dtype() {
            Dtype::F32 => floats(map(t.data(), f32::from_le_bytes)),
            Dtype::F16 => floats(map(t.data(), |b| f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => floats(map(t.data(), |b| bf16::from_le_bytes(b).to_f32())),
            Dtype::I64 => ints(map(t.data(), i64::from_le_bytes)),
            Dtype::I32 => ints(map(t.data(), |b| i64::from(i32::from_le_bytes(b)))),
            Dtype::U8 | Dtype::BOOL => ints(map(t.data(), |[b]| i64::from(b))),
            other => panic!("{}: tensors of {other:?} are not expected", path.display()),
        }
    };
    file.tensors().iter().map(|(n, t)| (n.clone(), array(t))).collect()
}

/// Tensors of a golden that are results; all others of a case are inputs.
const RESULTS: [&str; 27] = [
    "logits",
    "image_features",
    "video_features",
    "generated_ids",
    "generated_logits",
    "position_ids",
    "rope_deltas",
    "legacy_logits",
    "legacy_position_ids",
    "legacy_rope_deltas",
    "frames_u8",
    "cross_attention_states",
    "vision_last_hidden_state",
    "image_embeds",
    "text_embeds",
    "logits_per_image",
    "logits_per_text",
    "last_hidden_state",
    "pooler_output",
    "vision_pooler_output",
    "text_pooler_output",
    "text_last_hidden_state",
    "text_features",
    "eos2_text_features",
    "vision_hidden_states_m2",
    "loss",
    "distillation_loss",
];

/// Cases of a fixture that answers prompts.
pub fn cases(fixture_dir: &Path) -> Vec<String> {
    let golden = golden_json(fixture_dir);
    golden["cases"].as_object().expect("the golden has cases").keys().cloned().collect()
}

/// `golden.json` of a fixture.
pub fn golden_json(fixture_dir: &Path) -> serde_json::Value {
    let path = fixture_dir.join("golden.json");
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Writes the tensors `case/*` of a fixture's goldens that are inputs of the model (of an empty case, those without a slash), and
/// those that `also` names, as `vlmc exec` reads them.
pub fn write_inputs(fixture_dir: &Path, case: &str, also: &[&str], out: &Path) {
    let path = fixture_dir.join("golden.safetensors");
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let prefix = if case.is_empty() { String::new() } else { format!("{case}/") };
    let tensors: Vec<_> = file
        .tensors()
        .into_iter()
        .filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_string(), t)))
        .filter(|(n, _)| !n.contains('/') && (!RESULTS.contains(&n.as_str()) || also.contains(&n.as_str())))
        .collect();
    fs::write(out, safetensors::serialize(tensors, None).expect("tensors of a file")).expect("a temporary file");
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Array>;

/// A tensor of floats.
pub fn floats<'t>(t: &'t Tensors, name: &str) -> Option<&'t ArrayD<f32>> {
    t.get(name).map(|a| a.f32().expect("floats"))
}

/// Compares what a model that answers prompts gave for a case with the golden: logits where the mask is 1 (padded positions mean
/// nothing), features, ids.
pub fn check_case(case: &str, golden: &Tensors, out: &Tensors) {
    check_case_within(1e-4, case, golden, out);
}

/// [`check_case`] within another tolerance; tokens only within the usual one, as nearly equal logits may change places.
pub fn check_case_within(tolerance: f32, case: &str, golden: &Tensors, out: &Tensors) {
    let assert_close = |got: &ArrayD<f32>, reference: &ArrayD<f32>, what: &str| {
        let (difference, largest) = difference(got, reference);
        assert!(difference <= tolerance * largest.max(1.0), "{what}: differs by {difference}, the largest value is {largest}");
    };
    let reference = floats(golden, &format!("{case}/logits")).expect("the golden has logits");
    let logits = floats(out, "logits").expect("there are logits");
    // The golden has the last positions only if there are many.
    let (seq, kept) = (logits.shape()[1], reference.shape()[1]);
    for row in 0..logits.shape()[0] {
        let mask = golden.get(&format!("{case}/attention_mask")).map(|m| m.i64().expect("integers").index_axis(Axis(0), row).to_owned());
        let live = mask.map_or(seq, |m| m.iter().filter(|m| **m != 0).count()).min(kept);
        assert!(live > 0, "{case}: nothing to compare in row {row}");
        let part = |a: &ArrayD<f32>, from: usize| a.index_axis(Axis(0), row).slice_axis(Axis(0), (from..).into()).to_owned();
        assert_close(&part(logits, seq - live), &part(reference, kept - live), &format!("{case}: logits of row {row}"));
    }
    let rows = |a: &ArrayD<f32>| {
        let width = a.shape().last().copied().unwrap_or(1);
        a.to_shape((a.len() / width, width)).expect("rows of features").to_owned().into_dyn()
    };
    for name in ["image_features", "video_features", "cross_attention_states"] {
        if let Some(reference) = floats(golden, &format!("{case}/{name}")) {
            let got = floats(out, name).unwrap_or_else(|| panic!("{case}: there is no {name}"));
            assert_close(&rows(got), &rows(reference), &format!("{case}{name}"));
        }
    }
    if let Some(ids) = out.get("generated_ids").filter(|_| tolerance <= 1e-4) {
        let reference = golden[&format!("{case}/generated_ids")].i64().expect("integers");
        assert_eq!(ids.i64().expect("integers"), reference, "{case}: generated_ids");
    }
}

/// Runs a compiled fixture on the inputs of a case of its goldens.
pub fn exec_case(fixture_dir: &Path, artifact: &Path, case: &str, also: &[&str], new_tokens: usize) -> Tensors {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (inputs, outputs) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    write_inputs(fixture_dir, case, also, &inputs);
    let artifact = Artifact::open(artifact).unwrap_or_else(|e| panic!("{e}"));
    let run = |new_tokens| {
        let engine = open_engine(&artifact, &CPU).unwrap_or_else(|e| panic!("{e}"));
        vlmc::exec::exec(engine, &inputs, &outputs, new_tokens)
    };
    let done = run(new_tokens);
    let padding = done.as_ref().is_err_and(|e| e.to_string().contains("has padding before tokens; for target 'onnx-cuda'"));
    let padding = if padding { move_padding(&inputs) } else { vec![] };
    let warnings = if padding.is_empty() { done } else { run(0) }.unwrap_or_else(|e| panic!("{case}: {e}"));
    assert_eq!(warnings, Vec::<String>::new(), "{case}");
    let mut out = load(&outputs);
    if let Some(Array::F32(logits)) = out.get_mut("logits").filter(|_| !padding.is_empty()) {
        for (mut row, by) in logits.outer_iter_mut().zip(padding) {
            let rows: Vec<_> = row.outer_iter().map(|r| r.to_owned()).collect();
            for (i, from) in rows.iter().enumerate() {
                row.index_axis_mut(Axis(0), (i + by) % rows.len()).assign(from);
            }
        }
    }
    out
}

/// Moves the padding of rows from their beginning to their end, in all tensors that have a place per token; how long it was.
fn move_padding(path: &Path) -> Vec<usize> {
    let bytes = fs::read(path).expect("the inputs");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mask = load(path).remove("attention_mask").expect("a mask");
    let padding: Vec<usize> = mask.i64().expect("integers").outer_iter().map(|row| row.iter().take_while(|m| **m == 0).count()).collect();
    let (batch, seq) = (mask.shape()[0], mask.shape()[1]);
    let moved: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, t)| {
            let mut data = t.data().to_vec();
            if t.shape().starts_with(&[batch, seq]) {
                let row = data.len() / batch;
                data.chunks_mut(row).zip(&padding).for_each(|(d, by)| d.rotate_left(by * (row / seq)));
            }
            (name, t.dtype(), t.shape().to_vec(), data)
        })
        .collect();
    let views = moved.iter().map(|(name, dtype, shape, data)| {
        (name.clone(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).expect("a tensor of a file"))
    });
    fs::write(path, safetensors::serialize(views, None).expect("tensors of a file")).expect("a temporary file");
    padding
}

/// Every case of a fixture that answers prompts gives the golden's logits, features and tokens.
pub fn prompts_agree(name: &str, target: &str) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (fixture, artifact) = (fixture(name), dir.path().join("artifact"));
    compile(&fixture, target, &artifact);
    let golden = load(&fixture.join("golden.safetensors"));
    for case in cases(&fixture) {
        let out = exec_case(&fixture, &artifact, &case, &[], 8);
        assert!(out.contains_key("generated_ids") || (case == "batch" && target.starts_with("onnx-cuda")), "{case}");
        check_case_within(tolerance(self::target(target)), &case, &golden, &out);
    }
}

/// From messages and pictures to text, as the reference does it: pixels, prompt tokens, answer.
pub fn answers_agree(name: &str, target: &str) {
    let dir = fixture(name);
    let (golden, tensors) = (golden_json(&dir), load(&dir.join("golden.safetensors")));
    let out = tempfile::tempdir().expect("a temporary directory");
    let artifact = out.path().join("artifact");
    compile(&dir, target, &artifact);
    let mut model = vlmc_runtime::Model::open(&artifact, &CPU).unwrap_or_else(|e| panic!("{e}"));
    let mut options = model.defaults();
    let mut asked = 0;
    for case in golden["end_to_end"].as_array().expect("examples") {
        let ids =
            |field: &str| -> Vec<i64> { case[field].as_array().expect("a list").iter().map(|i| i.as_i64().expect("a token")).collect() };
        let expected = ids("generated_ids");
        options.sampling.do_sample = false;
        options.sampling.repetition_penalty = 1.0;
        options.max_new_tokens = expected.len();
        let (mut parts, mut pictures) = (vec![], vec![]);
        let user = case["messages"].as_array().expect("messages").iter().find(|m| m["role"] == "user").expect("a question");
        for part in user["content"].as_array().expect("parts") {
            parts.push(if part["type"] == "image" {
                let picture = vlmc_runtime::image::read(&fixture("pictures").join(part["image"].as_str().expect("a file name")));
                pictures.push(picture.unwrap_or_else(|e| panic!("{e}")));
                Part::Image(pictures[pictures.len() - 1].clone())
            } else {
                Part::Text(part["text"].as_str().expect("a text").into())
            });
        }
        let prefix = format!("{}/", case["case"].as_str().expect("a case"));
        pixels_agree(model.manifest().processor.as_ref().expect("a processor"), &pictures, &tensors, &prefix);
        let mut streamed = String::new();
        let mut conversation = model.conversation(None).unwrap_or_else(|e| panic!("{e}"));
        let reply = conversation.send(&parts, &options, &mut |t| streamed.push_str(t)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(conversation.tokens()[..ids("input_ids").len()], ids("input_ids"), "tokens of the prompt");
        drop(conversation);
        // The reference goes on after an end of text; an answer does not.
        let ends = &model.manifest().generation.eos_token_ids;
        let until = expected.iter().position(|i| ends.contains(i)).unwrap_or(expected.len());
        assert_eq!(reply.ids, expected[..until]);
        assert_eq!(reply.text, streamed);
        let text = case["text"].as_str().expect("a text");
        if until == expected.len() {
            assert_eq!(reply.text, text)
        } else {
            assert!(text.starts_with(&reply.text), "{:?}", reply.text)
        }
        asked += 1;
    }
    assert!(asked > 0, "no example");
}

/// What the runtime's processor makes of the pictures of a case, whose tensors' names begin with `case`, is what the reference's
/// made.
pub fn pixels_agree(processor: &Processor, pictures: &[vlmc_runtime::image::Rgb], golden: &Tensors, case: &str) {
    let made: Vec<_> =
        pictures.iter().map(|p| processor::image_among(processor, p, pictures.len()).unwrap_or_else(|e| panic!("{e}"))).collect();
    let mut compared = 0;
    for name in made.iter().flat_map(|p| p.inputs.keys()).collect::<std::collections::BTreeSet<_>>() {
        // Qwen-VL's pictures are shared by its cases.
        let Some(reference) = golden.get(&format!("{case}{name}")) else { continue };
        let of = || made.iter().map(|p| &p.inputs[name]);
        match reference {
            Array::F32(reference) => {
                let got: Vec<f32> = of().flat_map(|t| t.f32().expect("floats")).copied().collect();
                assert_eq!(got.len(), reference.len(), "{case}{name}");
                let largest = got.iter().zip(reference).fold(0f32, |d, (a, b)| d.max((a - b).abs()));
                assert!(got.iter().all(|v| v.is_finite()) && largest <= 1e-6, "{case}{name} differs by {largest}");
            }
            _ => {
                let got: Vec<i64> = of().flat_map(|t| t.i64().expect("integers")).copied().collect();
                assert!(got.iter().eq(reference.i64().expect("integers")), "{case}{name}");
            }
        }
        compared += 1;
    }
    assert!(compared > 0, "{case}: nothing to compare");
}

/// Golden tensors that a model without prompts must give, wherever a golden has them.
const GIVEN: [&str; 9] = [
    "logits",
    "image_embeds",
    "text_embeds",
    "logits_per_image",
    "logits_per_text",
    "last_hidden_state",
    "pooler_output",
    "vision_pooler_output",
    "text_pooler_output",
];

/// A model without prompts gives what the golden has, within `tolerance`, for the inputs without a case and those of `cases`.
pub fn forward_agrees(name: &str, target: &str, cases: &[&str], tolerance: f32) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (fixture, artifact) = (fixture(name), dir.path().join("artifact"));
    compile(&fixture, target, &artifact);
    let golden = load(&fixture.join("golden.safetensors"));
    for case in [&[""], cases].concat() {
        let prefix = if case.is_empty() { String::new() } else { format!("{case}/") };
        let out = exec_case(&fixture, &artifact, case, &[], 0);
        let mut compared = 0;
        for name in GIVEN {
            let Some(reference) = floats(&golden, &format!("{prefix}{name}")) else { continue };
            let got = floats(&out, name).unwrap_or_else(|| panic!("there is no {prefix}{name}"));
            let (difference, largest) = difference(got, reference);
            let allowed =
                if self::target(target).float == DType::F32 { tolerance } else { self::tolerance(self::target(target)) * largest.max(1.0) };
            assert!(difference <= allowed, "{prefix}{name} differs by {difference}");
            compared += 1;
        }
        assert!(compared > 0, "{case}: nothing to compare");
    }
}

/// The processor of a model without prompts makes the golden's pixels of the golden's pictures.
pub fn pictures_agree(name: &str) {
    let dir = fixture(name);
    let processor = Model::open(&dir).and_then(|m| m.processor()).unwrap_or_else(|e| panic!("{e}")).expect("a processor");
    let names = golden_json(&dir)["pictures"].as_array().expect("names of pictures").clone();
    let read = |name: &serde_json::Value| {
        let file = fixture("pictures").join(format!("{}.png", name.as_str().expect("a name")));
        vlmc_runtime::image::read(&file).unwrap_or_else(|e| panic!("{e}"))
    };
    let pictures: Vec<_> = names.iter().map(read).collect();
    pixels_agree(&processor, &pictures, &load(&dir.join("golden.safetensors")), "");
}

/// A target by its name, with the type that it computes in and the version of its operators if they follow: `onnx-tensorrt:f32:17`.
pub fn target(name: &str) -> &'static Target {
    let mut parts = name.split(':');
    let (name, float, opset) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    let float = float.map(|f| match f {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        other => panic!("{other}"),
    });
    let target = vlmc::target::configured(name, float, opset.map(|v| v.parse().expect("a number")));
    Box::leak(Box::new(target.unwrap_or_else(|e| panic!("{e}"))))
}

/// What results of a target may differ by, relative to the largest.
pub fn tolerance(target: &Target) -> f32 {
    if target.float == DType::F32 { 1e-4 } else { 2e-2 }
}

/// Compiles a fixture.
pub fn compile(fixture_dir: &Path, target: &str, out: &Path) {
    let model = Model::open(fixture_dir).unwrap_or_else(|e| panic!("{e}"));
    compile_with(&model, target, &Policy::none(), out).unwrap_or_else(|e| panic!("{e}"));
}

/// Compiles a model for a target that [`target`] knows.
///
/// # Errors
/// As [`Model::compile`].
pub fn compile_with(model: &Model, target: &str, policy: &Policy, out: &Path) -> vlmc::Result<vlmc::compile::Report> {
    let target = self::target(target);
    // A GPU has no attention over a cache in f32; the CPU, where tests run it, has.
    let allow_fallback = (target.name, target.float) == ("onnx-cuda", DType::F32);
    model.compile(&Options { target, out, policy, allow_fallback, progress: &|_, _| {} })
}

/// Largest difference, and largest absolute value of the reference.
pub fn difference(got: &ArrayD<f32>, reference: &ArrayD<f32>) -> (f32, f32) {
    assert_eq!(got.shape(), reference.shape());
    assert!(got.iter().chain(reference).all(|v| v.is_finite()), "a value is not finite");
    got.iter().zip(reference).fold((0.0, 0.0), |(d, m): (f32, f32), (g, r)| (d.max((g - r).abs()), m.max(r.abs())))
}

/// Length of the difference, relative to that of the reference.
pub fn relative_error(got: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(got.len(), reference.len());
    let length = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    length(&mut got.iter().zip(reference).map(|(a, b)| a - b)) / length(&mut reference.iter().copied())
}

/// Fails unless `got` is within `1e-4 * max(1, |reference|max)`.
pub fn assert_close(got: &ArrayD<f32>, reference: &ArrayD<f32>, what: &str) {
    let (difference, largest) = difference(got, reference);
    assert!(difference <= 1e-4 * largest.max(1.0), "{what}: differs by {difference}, the largest value is {largest}");
}
