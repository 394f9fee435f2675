//! The binary as a user meets it: help, good runs, and what bad input gives.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use safetensors::SafeTensors;
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

fn vlmc(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlmc"));
    // Nothing of the user's own: no cache, no network.
    command
        .args(args)
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HUB_CACHE", "/nonexistent")
        .env("VLMC_CACHE", "/nonexistent")
        .env("COLUMNS", "100");
    command.output().expect("the binary runs")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn stdout(out: &Output) -> String {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The error of a command that must fail with exit code 1 and one message.
fn failure(dir: &Path, args: &[&str]) -> String {
    let out = vlmc(args);
    assert_eq!(out.status.code(), Some(1), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(message.matches("error:").count(), 1, "{message}");
    assert!(!message.contains("panicked"), "{message}");
    message.replace(text(dir), "<dir>")
}

/// A copy of the tiny checkpoint, to be damaged.
fn copy(dir: &TempDir) -> PathBuf {
    let to = dir.path().join("checkpoint");
    fs::create_dir(&to).unwrap();
    for name in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        fs::copy(fixture("qwen2-vl").join(name), to.join(name)).unwrap();
    }
    to
}

fn edit_config(checkpoint: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = checkpoint.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
}

/// Rewrites the safetensors header of the checkpoint; the data stays.
fn edit_header(checkpoint: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = checkpoint.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    edit(&mut header);
    let header = serde_json::to_vec(&header).unwrap();
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + n..]].concat()).unwrap();
}

/// Makes two shards of the checkpoint's weights, and the index.
fn shard(checkpoint: &Path) {
    let whole = checkpoint.join("model.safetensors");
    let bytes = fs::read(&whole).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort();
    let mut weight_map = serde_json::Map::new();
    for (i, names) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", i + 1);
        let tensors = names.iter().map(|n| (*n, file.tensor(n).unwrap()));
        fs::write(checkpoint.join(&name), safetensors::serialize(tensors, None).unwrap()).unwrap();
        weight_map.extend(names.iter().map(|n| (n.to_string(), name.clone().into())));
    }
    fs::write(checkpoint.join("model.safetensors.index.json"), serde_json::json!({"weight_map": weight_map}).to_string()).unwrap();
    fs::remove_file(whole).unwrap();
}

/// Truncates a file to half its length.
fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

/// What `compile` says of a damaged checkpoint; it must leave nothing behind.
fn refusal(damage: impl FnOnce(&Path)) -> String {
    let dir = TempDir::new().unwrap();
    let checkpoint = copy(&dir);
    damage(&checkpoint);
    let out = dir.path().join("artifact");
    let message = failure(dir.path(), &["compile", text(&checkpoint), "-o", text(&out)]);
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["checkpoint"], "something was left behind");
    message
}

/// Without `--threads`, the affinity mask of the process decides.
#[cfg(target_os = "linux")]
#[test]
fn threads_are_as_many_as_the_process_may_use() {
    let config = fixture("qwen2-vl").join("config.json");
    let args = ["inspect", text(&config), "--context", "8", "--json"];
    let threads = |out: &Output| serde_json::from_str::<serde_json::Value>(&stdout(out)).unwrap()["request"]["threads"].clone();
    let free = std::thread::available_parallelism().unwrap().get();
    assert_eq!(threads(&vlmc(&args)), free);
    let given = vlmc(&[&args[..], &["--threads", "3"]].concat());
    assert_eq!(threads(&given), 3);
    let allowed = fs::read_to_string("/proc/self/status").unwrap();
    let allowed = allowed.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_string();
    let first = allowed.split([',', '-']).next().unwrap();
    let pinned = Command::new("taskset").args(["-c", first, env!("CARGO_BIN_EXE_vlmc")]).args(args).output();
    // util-linux may be missing; without it nothing can be pinned.
    if let Ok(pinned) = pinned {
        assert_eq!(threads(&pinned), 1);
    }
}

#[test]
fn help_says_what_there_is() {
    for (name, args) in [
        ("help", &["--help"][..]),
        ("help_compile", &["compile", "--help"]),
        ("help_run", &["run", "--help"]),
        ("help_embed", &["embed", "--help"]),
        ("help_exec", &["exec", "--help"]),
        ("help_eval", &["eval", "--help"]),
    ] {
        insta::assert_snapshot!(name, stdout(&vlmc(args)));
    }
    insta::assert_snapshot!("archs", stdout(&vlmc(&["archs"])));
    insta::assert_snapshot!("targets", stdout(&vlmc(&["targets"])));
}

#[test]
fn damaged_checkpoints_are_refused() {
    type Damage<'a> = &'a dyn Fn(&Path);
    let cases: [(&str, Damage<'_>); 17] = [
        ("no tensor entry", &|d| edit_header(d, |h| _ = h["model.layers.1.mlp.up_proj.weight"].take())),
        ("missing tensor", &|d| {
            edit_header(d, |h| {
                let t = h.as_object_mut().unwrap().remove("model.layers.1.mlp.up_proj.weight").unwrap();
                h["model.layers.1.mlp.up_project.weight"] = t;
            });
        }),
        ("wrapped for training", &|d| {
            edit_header(d, |h| {
                let wrapped = |(k, v): (&String, &serde_json::Value)| {
                    (if k == "__metadata__" { k.clone() } else { format!("module.{k}") }, v.clone())
                };
                *h = h.as_object().unwrap().iter().map(wrapped).collect();
            });
        }),
        ("wrong shape", &|d| edit_header(d, |h| h["model.norm.weight"]["shape"] = serde_json::json!([32, 2]))),
        ("wrong length", &|d| edit_header(d, |h| h["model.norm.weight"]["shape"] = serde_json::json!([63]))),
        ("truncated", &|d| truncate(&d.join("model.safetensors"))),
        ("truncated shard", &|d| {
            shard(d);
            truncate(&d.join("model-00002-of-00002.safetensors"));
        }),
        ("missing shard", &|d| {
            shard(d);
            fs::remove_file(d.join("model-00002-of-00002.safetensors")).unwrap();
        }),
        ("index of other shards", &|d| {
            shard(d);
            let path = d.join("model.safetensors.index.json");
            let index = fs::read_to_string(&path).unwrap();
            fs::write(path, index.replace("\"model.norm.weight\":\"model-00001", "\"model.norm.weight\":\"model-00002")).unwrap();
        }),
        ("unknown architecture", &|d| edit_config(d, |c| c["model_type"] = "gpt5".into())),
        ("heads do not divide hidden", &|d| edit_config(d, |c| c["num_attention_heads"] = 5.into())),
        ("heads do not divide the width of patches", &|d| edit_config(d, |c| c["vision_config"]["num_heads"] = 5.into())),
        ("sections do not fit", &|d| edit_config(d, |c| c["rope_scaling"]["mrope_section"] = serde_json::json!([1, 2, 3]))),
        ("huge number", &|d| edit_config(d, |c| c["num_hidden_layers"] = 1_000_000_000.into())),
        ("sliding window", &|d| edit_config(d, |c| c["use_sliding_window"] = true.into())),
        ("config is no JSON", &|d| fs::write(d.join("config.json"), "{\"model_type\": ").unwrap()),
        ("no weights", &|d| fs::remove_file(d.join("model.safetensors")).unwrap()),
    ];
    let all: String = cases.iter().map(|(name, damage)| format!("{name}:\n  {}", refusal(|d| damage(d)))).collect();
    insta::assert_snapshot!(all);
}

#[test]
fn bad_requests_are_refused() {
    let dir = TempDir::new().unwrap();
    let artifact = dir.path().join("artifact");
    let model = fixture("qwen2-vl");
    stdout(&vlmc(&["compile", text(&model), "-o", text(&artifact)]));
    let picture = fixture("pictures/small.png");
    let bytes = fs::read(&picture).unwrap();
    let corrupt = dir.path().join("corrupt.png");
    fs::write(&corrupt, [&bytes[..bytes.len() / 2], b"junk", &bytes[bytes.len() / 2 + 4..]].concat()).unwrap();
    let cut = dir.path().join("cut.png");
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let no_picture = dir.path().join("text.png");
    fs::write(&no_picture, "not a picture").unwrap();
    let inputs = dir.path().join("in.safetensors");
    fs::write(&inputs, "junk").unwrap();
    let out = dir.path().join("out.safetensors");
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("keep.txt"), "mine").unwrap();

    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let samples = dir.path().join("samples.jsonl");
    fs::write(&samples, format!("{{\"image\": {picture:?}, \"prompt\": \"What is this?\"}}")).unwrap();

    let run = |extra: &[&str]| failure(dir.path(), &[&["run", text(&artifact), "--prompt", "What is this?"][..], extra].concat());
    let mut all = String::new();
    let mut add = |name: &str, message: String| all += &format!("{name}:\n  {message}");
    add("corrupt picture", run(&["--image", text(&corrupt)]));
    add("truncated picture", run(&["--image", text(&cut)]));
    add("no picture", run(&["--image", text(&no_picture)]));
    add("missing picture", run(&["--image", text(&dir.path().join("none.png"))]));
    add(
        "more placeholders than pictures",
        failure(
            dir.path(),
            &["run", text(&artifact), "--image", text(&picture), "--prompt", "<|vision_start|><|image_pad|><|vision_end|>What?"],
        ),
    );
    add("bad option", run(&["--top-p", "2"]));
    let mut compile = |name: &str, options: &[&str]| {
        add(name, failure(dir.path(), &[&["compile", text(&model), "-o", text(&out)][..], options].concat()));
    };
    compile("auto without a budget", &["--quant", "auto"]);
    compile("a budget without auto", &["--quant", "int4", "--budget", "4.5bpw"]);
    compile("a budget too small", &["--quant", "auto", "--budget", "2"]);
    compile("calibration without samples", &["--quant", "int4", "--calibrate", text(&empty)]);
    compile("calibration for nothing", &["--calibrate", text(&samples)]);
    add("exec of junk", failure(dir.path(), &["exec", text(&artifact), "--inputs", text(&inputs), "--outputs", text(&out)]));
    let golden = fs::read(model.join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&golden).unwrap();
    // The tensors of one case, but those of `instead` from another one.
    let mut exec = |name: &str, instead: &[(&str, &str)], leave_out: &str| {
        let names = ["input_ids", "attention_mask", "pixel_values", "image_grid_thw"].into_iter().filter(|n| *n != leave_out);
        let case = |n: &str| instead.iter().find(|(i, _)| *i == n).map_or("chat", |(_, case)| *case);
        let tensors: Vec<_> = names.map(|n| (n, golden.tensor(&format!("{}/{n}", case(n))).unwrap())).collect();
        fs::write(&inputs, safetensors::serialize(tensors, None).unwrap()).unwrap();
        add(name, failure(dir.path(), &["exec", text(&artifact), "--inputs", text(&inputs), "--outputs", text(&out)]));
    };
    exec("exec without ids", &[], "input_ids");
    exec("exec of pixels without a grid", &[], "image_grid_thw");
    exec("exec of pixels of another grid", &[("pixel_values", "two")], "");
    exec("exec of more pictures than placeholders", &[("pixel_values", "two"), ("image_grid_thw", "two")], "");
    exec("exec of placeholders without pictures", &[("input_ids", "two"), ("attention_mask", "two")], "");
    exec("exec of a mask of another length", &[("attention_mask", "two")], "");
    add("unknown target", failure(dir.path(), &["compile", text(&model), "--target", "onnx-metal", "-o", text(&out)]));
    add("unknown policy", failure(dir.path(), &["compile", text(&model), "--quant", "int3", "-o", text(&out)]));
    add("unknown model", failure(dir.path(), &["compile", "qwen2-vl", "-o", text(&out)]));
    add("not a name", failure(dir.path(), &["compile", "no-such-model", "-o", text(&out)]));
    add("unknown pass", failure(dir.path(), &["dump", text(&model), "--after", "fuse"]));
    add("directory that is not ours", failure(dir.path(), &["compile", text(&model), "-o", text(&other)]));
    let weights = artifact.join("weights.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    bytes.truncate(bytes.len() - 1);
    fs::write(&weights, bytes).unwrap();
    add("damaged artifact", run(&[]));
    assert!(!out.exists());
    assert_eq!(fs::read_to_string(other.join("keep.txt")).unwrap(), "mine");
    insta::assert_snapshot!(all);
}

#[test]
fn artifacts_do_not_depend_on_threads() {
    let dir = TempDir::new().unwrap();
    for target in ["cpu", "onnx-cpu"] {
        let compile = |threads: &str| {
            let out = dir.path().join(format!("{target}-{threads}"));
            stdout(&vlmc(&["compile", text(&fixture("qwen2-vl")), "--target", target, "--threads", threads, "-o", text(&out)]));
            let mut files: Vec<_> = fs::read_dir(&out).unwrap().map(|e| e.unwrap().path()).collect();
            files.sort();
            files.iter().map(|f| (f.file_name().unwrap().to_owned(), fs::read(f).unwrap())).collect::<Vec<_>>()
        };
        assert!(compile("1") == compile("3"), "{target}: other bytes with other threads");
    }
}

#[test]
fn a_checkpoint_without_tokenizer_compiles_with_a_warning() {
    let dir = TempDir::new().unwrap();
    let checkpoint = copy(&dir);
    for name in ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"] {
        fs::remove_file(checkpoint.join(name)).unwrap();
    }
    let artifact = dir.path().join("artifact");
    let out = vlmc(&["compile", text(&checkpoint), "-o", text(&artifact)]);
    stdout(&out);
    insta::assert_snapshot!("warnings", String::from_utf8_lossy(&out.stderr));
    insta::assert_snapshot!("run_without_tokenizer", failure(dir.path(), &["run", text(&artifact), "--prompt", "x"]));
}

#[test]
fn graphs_as_text() {
    insta::assert_snapshot!("ir_tiny", stdout(&vlmc(&["dump", text(&fixture("qwen2-vl"))])));
    let dir = TempDir::new().unwrap();
    let config = dir.path().join("config.json");
    fs::write(&config, serde_json::to_vec(&(vlmc::synth::preset("qwen2-vl-2b").unwrap().config)()).unwrap()).unwrap();
    insta::assert_snapshot!(
        "ir_tiny_onnx_cpu",
        stdout(&vlmc(&["dump", text(&fixture("qwen2-vl")), "--target", "onnx-cpu", "--after", "dce"]))
    );
    let artifact = dir.path().join("artifact");
    stdout(&vlmc(&["compile", text(&fixture("qwen2-vl")), "--target", "onnx-cpu", "-o", text(&artifact)]));
    insta::assert_snapshot!("onnx_tiny", stdout(&vlmc(&["dump", text(&artifact)])));
    let native = dir.path().join("native");
    stdout(&vlmc(&["compile", text(&fixture("qwen2-vl")), "-o", text(&native)]));
    insta::assert_snapshot!("cpu_tiny", stdout(&vlmc(&["dump", text(&native), "--graph", "decoder"])));
    insta::assert_snapshot!("inspect_checkpoint", stdout(&vlmc(&["inspect", text(&config)])));
    insta::assert_snapshot!("inspect_artifact", stdout(&vlmc(&["inspect", text(&native), "--verify"])));
    assert!(stdout(&vlmc(&["dump", text(&config), "--format", "dot", "--graph", "vision"])).contains("digraph"));
}

/// Graphs for GPUs: of a decoder with a cache, a tower with windows, latent attention and experts, and a pair of towers.
#[test]
fn graphs_for_gpus_as_text() {
    let dir = TempDir::new().unwrap();
    for target in ["onnx-cuda", "onnx-tensorrt"] {
        for name in ["qwen2-vl", "qwen2.5-vl", "deepseek-vl2-mla", "siglip"] {
            let artifact = dir.path().join(format!("{name}-{target}"));
            stdout(&vlmc(&["compile", text(&fixture(name)), "--target", target, "-o", text(&artifact)]));
            let mut shown = stdout(&vlmc(&["dump", text(&artifact)]));
            if target == "onnx-tensorrt" {
                shown += &fs::read_to_string(artifact.join("trtexec.txt")).unwrap();
            }
            insta::assert_snapshot!(format!("{target}_{name}").replace(['-', '.'], "_"), shown);
        }
    }
}

/// What the target's provider has no kernels for is refused, or told of; options that are not the target's are refused.
#[test]
fn targets_are_strict() {
    let dir = TempDir::new().unwrap();
    let (model, out) = (fixture("qwen2-vl"), dir.path().join("artifact"));
    let compile = |options: &[&str]| vlmc(&[&["compile", text(&model), "-o", text(&out), "--target"], options].concat());
    let refused = |options: &[&str]| {
        let found = compile(options);
        assert!(!found.status.success() && !out.exists(), "{options:?}");
        String::from_utf8_lossy(&found.stderr).into_owned()
    };
    let fallback = ["onnx-cuda", "--dtype", "f32"];
    let mut told = refused(&fallback);
    told += &refused(&["cpu", "--dtype", "f16"]);
    told += &refused(&["onnx-cpu", "--dtype", "bf16"]);
    told += &refused(&["onnx-tensorrt", "--opset", "16"]);
    told += &refused(&["onnx-cuda", "--opset", "17"]);
    let allowed = compile(&[&fallback[..], &["--allow-fallback"]].concat());
    assert!(allowed.status.success());
    insta::assert_snapshot!("targets_are_strict", format!("{told}\n{}", String::from_utf8_lossy(&allowed.stderr)));
}

/// The text form gives the same program back.
#[test]
fn dumped_text_parses_to_the_same_text() {
    let dir = TempDir::new().unwrap();
    let config = dir.path().join("config.json");
    fs::write(&config, serde_json::to_vec(&(vlmc::synth::preset("qwen2-vl-7b").unwrap().config)()).unwrap()).unwrap();
    let passes: Vec<_> = vlmc::target::named("onnx-cpu").unwrap().passes.iter().map(|p| p.name).collect();
    for args in
        passes.iter().map(|p| vec!["dump", text(&config), "--target", "onnx-cpu", "--after", p]).chain([vec!["dump", text(&config)]])
    {
        let printed = stdout(&vlmc(&args));
        let parsed = vlmc_ir::text::parse(&printed).unwrap_or_else(|e| panic!("{args:?}: {e}"));
        assert_eq!(parsed.to_string(), printed, "{args:?}");
        vlmc_ir::verify(parsed).unwrap_or_else(|found| panic!("{args:?}: {}", found[0]));
    }
}

/// Models without prompts: labels, vectors, and what they say to requests that are not for them.
#[test]
fn models_without_prompts() {
    let dir = TempDir::new().unwrap();
    let [vit, clip, qwen] = ["vit", "clip", "qwen2-vl"].map(|name| {
        let out = dir.path().join(name);
        stdout(&vlmc(&["compile", text(&fixture(name)), "-o", text(&out)]));
        out
    });
    let picture = |name: &str| fixture("pictures").join(name);
    let (wide, tall) = (picture("wide.png"), picture("tall.png"));
    insta::assert_snapshot!("labels", stdout(&vlmc(&["run", text(&vit), "--image", text(&wide)])));

    let pictures = dir.path().join("pictures");
    fs::create_dir(&pictures).unwrap();
    for (from, to) in [(&wide, "a.png"), (&tall, "b.PNG")] {
        fs::copy(from, pictures.join(to)).unwrap();
    }
    fs::write(pictures.join("notes.txt"), "not a picture").unwrap();
    let [npy, tensors] = ["v.npy", "v.safetensors"].map(|name| dir.path().join(name));
    stdout(&vlmc(&["embed", text(&clip), "--images", text(&pictures), "-o", text(&npy), "--batch", "1"]));
    let report = stdout(&vlmc(&["embed", text(&clip), "--images", text(&wide), text(&tall), "-o", text(&tensors), "--json"]));
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!((&report["count"], &report["width"]), (&2.into(), &24.into()));
    let bytes = fs::read(&tensors).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let names: Vec<PathBuf> = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["names"]).unwrap();
    assert_eq!(names, [wide.clone(), tall.clone()]);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let golden = fs::read(fixture("clip").join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&golden).unwrap();
    let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>();
    let reference = floats(golden.tensor("image_embeds").unwrap().data());
    let npy = fs::read(&npy).unwrap();
    for vectors in [floats(file.tensor("image_embeds").unwrap().data()), floats(&npy[128..])] {
        assert_eq!(vectors.len(), reference.len());
        assert!(vectors.iter().zip(&reference).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let out = dir.path().join("o.npy");
    let (wide, out, empty) = (text(&wide), text(&out), text(&empty));
    let refused = [
        &["run", text(&vit), "--prompt", "What is it?", "--image", wide][..],
        &["run", text(&vit)],
        &["run", text(&vit), "--image", wide, "--text", "a cat"],
        &["run", text(&clip), "--image", wide],
        &["run", text(&clip), "--image", wide, "--text", "a cat"],
        &["run", text(&qwen), "--image", wide, "--text", "a cat"],
        &["run", text(&qwen), "--image", wide],
        &["embed", text(&qwen), "--images", wide, "-o", out],
        &["embed", text(&vit), "--text", "a cat", "-o", out],
        &["embed", text(&clip), "--text", "a cat", "-o", out],
        &["embed", text(&clip), "--images", wide, "-o", "vectors.csv"],
        &["embed", text(&clip), "--images", empty, "-o", out],
    ]
    .map(|args| failure(dir.path(), args))
    .concat();
    insta::assert_snapshot!("models_without_prompts_refuse", refused);
    assert!(!Path::new(out).exists());
}

/// An artifact is compared with its checkpoint, and what came out is in its manifest; of a program with a fault, the layer is named.
#[test]
fn verifies_artifacts() {
    let dir = TempDir::new().unwrap();
    let (model, artifact, page) = (fixture("qwen2-vl"), dir.path().join("artifact"), dir.path().join("report.html"));
    stdout(&vlmc(&["compile", text(&model), "-o", text(&artifact)]));
    let base = ["verify", text(&artifact), "--checkpoint", text(&model), "--max-new-tokens", "2"];
    fn with<'a>(base: &[&'a str], extra: &[&'a str]) -> Vec<&'a str> {
        [base, extra].concat()
    }
    let inspected = || stdout(&vlmc(&["inspect", text(&artifact)]));

    let report = stdout(&vlmc(&with(&base, &["--no-certificate"])));
    assert!(report.contains("model.layers.1 ") && report.contains("greedy tokens 2 of 2"), "{report}");
    assert!(report.contains("The artifact agrees with its checkpoint"), "{report}");
    assert!(!inspected().contains("certificate"));
    let picture = fixture("pictures/small.png");
    let args = ["--image", text(&picture), "--prompt", "What is it?", "--json", "--html", text(&page)];
    let report: serde_json::Value = serde_json::from_str(&stdout(&vlmc(&with(&base, &args)))).unwrap();
    assert!(report["nodes"].as_array().unwrap().len() > 30 && report["requests"][0]["outputs"]["logits"]["relative"].is_number());
    assert!(fs::read_to_string(&page).unwrap().contains("<svg"));
    assert!(inspected().contains("certificate: agrees with its checkpoint"));

    let (other, empty, none) = (fixture("vit"), dir.path().join("empty"), dir.path().join("none.png"));
    fs::create_dir(&empty).unwrap();
    let refused = [
        &["verify", text(&model), "--checkpoint", text(&model)][..],
        &["verify", text(&artifact), "--checkpoint", text(&other)],
        &with(&base, &["--image", text(&picture)]),
        &with(&base, &["--image", text(&none), "--prompt", "What is it?"]),
        &with(&base, &["--data", text(&empty)]),
        &with(&base, &["--data", text(&none)]),
    ]
    .map(|args| failure(dir.path(), args).replace(text(&fixture("")), "<fixtures>/"))
    .concat();
    insta::assert_snapshot!("verify_refuses", refused);

    // A norm of one layer adds something else to its mean square.
    let path = artifact.join("program.json");
    let mut program: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let steps = program["functions"].as_array_mut().unwrap().iter_mut().flat_map(|f| f["steps"].as_array_mut().unwrap());
    let eps = steps.filter(|s| s["scope"].as_str().is_some_and(|s| s.starts_with("model.layers.1"))).find_map(|s| s.get_mut("eps"));
    *eps.unwrap() = 0.5.into();
    fs::write(&path, serde_json::to_vec(&program).unwrap()).unwrap();
    let bytes = fs::read(&path).unwrap();
    let sha256: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    let manifest = artifact.join("manifest.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    json["files"]["program.json"] = serde_json::json!({"bytes": bytes.len(), "sha256": sha256});
    fs::write(&manifest, json.to_string()).unwrap();
    let message = failure(dir.path(), &with(&base, &[]));
    assert!(message.contains("differs from its checkpoint, first in model.layers.1: rms_norm with model.layers.1."), "{message}");
    assert!(inspected().contains("certificate: DIFFERS from its checkpoint"));
}

/// What each layout adds to the graphs: their inputs and outputs, and the texts that clients read.
#[test]
fn layouts() {
    let cases = [
        ("genai", "qwen2-vl"),
        ("genai", "deepseek-vl2-mla"),
        ("transformers-js", "qwen2.5-vl"),
        ("transformers-js", "llava-1.5"),
        ("transformers-js", "siglip"),
        ("triton", "qwen2-vl"),
        ("triton", "vit"),
    ];
    for (layout, name) in cases {
        let dir = TempDir::new().unwrap();
        let artifact = dir.path().join("artifact");
        stdout(&vlmc(&["compile", text(&fixture(name)), "--target", "onnx-cpu", "--layout", layout, "-o", text(&artifact)]));
        let shown = stdout(&vlmc(&["inspect", text(&artifact), "--verify"]));
        // Sizes change with every op.
        let mut all = shown.lines().next().unwrap().to_string() + &shown[shown.find("\n\ngraph").unwrap()..];
        let manifest: serde_json::Value = serde_json::from_slice(&fs::read(artifact.join("manifest.json")).unwrap()).unwrap();
        for file in manifest["files"].as_object().unwrap().keys() {
            all += &format!("\n==== {file}\n");
            let read = ["json", "pbtxt", "md"].iter().any(|end| file.ends_with(&format!(".{end}")));
            if read && file != "tokenizer.json" && file != "tokenizer_config.json" {
                all += &fs::read_to_string(artifact.join(file)).unwrap();
            }
        }
        insta::assert_snapshot!(format!("layout_{layout}_{name}"), all);
    }
}

#[test]
fn layouts_refuse() {
    let dir = TempDir::new().unwrap();
    let (artifact, other) = (dir.path().join("artifact"), dir.path().join("other"));
    let (qwen, mllama) = (fixture("qwen2-vl"), fixture("llama-3.2-vision"));
    stdout(&vlmc(&["compile", text(&qwen), "--target", "onnx-cpu", "--layout", "genai", "-o", text(&artifact)]));
    let inputs = qwen.join("golden.safetensors");
    let checkpoint = text(&qwen);
    let mut all = String::new();
    let mut add = |name: &str, args: &[&str]| all += &format!("{name}:\n  {}", failure(dir.path(), args));
    add("unknown layout", &["compile", checkpoint, "--target", "onnx-cpu", "--layout", "llama.cpp", "-o", text(&other)]);
    add("target cpu", &["compile", checkpoint, "--layout", "genai", "-o", text(&other)]);
    for layout in ["genai", "transformers-js", "triton"] {
        add("architecture", &["compile", text(&mllama), "--target", "onnx-cpu", "--layout", layout, "-o", text(&other)]);
    }
    add("run", &["run", text(&artifact), "--prompt", "x"]);
    add("exec", &["exec", text(&artifact), "--inputs", text(&inputs), "--outputs", text(&dir.path().join("out"))]);
    add("verify", &["verify", text(&artifact), "--checkpoint", checkpoint]);
    add("bench", &["bench", text(&artifact)]);
    insta::assert_snapshot!(all);
    assert!(!other.exists());
}

/// A provider that is not there is an error that says what was looked for and what to do; the CPU runs what it has kernels for.
#[test]
fn providers_that_are_missing_are_told_of() {
    let dir = TempDir::new().unwrap();
    let picture = fixture("shapes-vl/example.png");
    let artifact = |name: &str, options: &[&str]| {
        let out = dir.path().join(name);
        stdout(&vlmc(&[&["compile", text(&fixture("shapes-vl")), "-o", text(&out)], options].concat()));
        out
    };
    let run = |artifact: &Path, options: &[&str]| -> Vec<String> {
        let ask = ["run", text(artifact), "--image", text(&picture), "--prompt", "How many circles are there?"];
        [&ask[..], options].concat().into_iter().map(String::from).collect()
    };
    let fails = |args: &[String]| failure(dir.path(), &args.iter().map(String::as_str).collect::<Vec<_>>());
    let library = std::env::var("ORT_DYLIB_PATH").unwrap();
    let [cpu, cuda, tensorrt] =
        [("cpu", "cpu"), ("cuda", "onnx-cuda"), ("tensorrt", "onnx-tensorrt")].map(|(name, target)| artifact(name, &["--target", target]));
    for (artifact, provider) in [(&cuda, "cuda"), (&tensorrt, "tensorrt")] {
        let message = fails(&run(artifact, &[]));
        for part in [&format!("the provider '{provider}'"), &library, "onnxruntime-gpu", "ORT_DYLIB_PATH", "--provider cpu"] {
            assert!(message.contains(part), "{message}");
        }
        let answer = vlmc(&run(artifact, &["--provider", "cpu"]).iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(stdout(&answer).trim(), "two");
    }
    assert!(fails(&run(&tensorrt, &["--provider", "cuda"])).contains("the provider 'cuda'"));
    assert!(fails(&run(&cpu, &["--provider", "cuda"])).contains("target 'cpu' has no provider 'cuda'"));
    let narrow = artifact("bf16", &["--target", "onnx-cuda", "--dtype", "bf16"]);
    let message = fails(&run(&narrow, &["--provider", "cpu"]));
    assert!(message.contains("for target 'onnx-cuda'") && message.contains("--dtype f16"), "{message}");
    let args = run(&cuda, &["--provider", "gpu"]);
    let out = vlmc(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(String::from_utf8_lossy(&out.stderr).contains("must be one of cpu, cuda, tensorrt"));
}
