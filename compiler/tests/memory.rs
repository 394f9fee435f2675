//! How much memory requests take: the plans of published models against the least that any plan could, and what `vlmc inspect`
//! tells against what a process really takes.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};
use vlmc::{
    arch::{ARCHITECTURES, Preset},
    compile::Model,
    synth,
};
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{Request, artifact::Task, needs};

fn open(preset: &Preset) -> Model {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in (preset.files)().into_iter().chain([("config.json", (preset.config)())]) {
        fs::write(dir.path().join(name), serde_json::to_vec(&content).unwrap()).unwrap();
    }
    Model::from_config(&dir.path().join("config.json")).unwrap()
}

#[test]
fn plans_are_close_to_what_is_alive_at_once() {
    let mut worst: f64 = 0.0;
    for preset in ARCHITECTURES.iter().flat_map(|a| a.presets) {
        let (manifest, program, _) =
            open(preset).outline(&Policy::named("none").unwrap()).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        // Vision alone is what a picture adds to a prompt; the context leaves room for the tokens of the largest.
        let longest = manifest.task.prompt().map_or(1, |p| p.max_positions);
        let pictures = if manifest.processor.is_some() { vec![vec![], vec![[448, 448]], vec![[1344, 1344]]] } else { vec![vec![]] };
        let mut ran = 0;
        for (pictures, context) in pictures.into_iter().flat_map(|p| [128, 512, 4096, 8192].map(|context| (p.clone(), context))) {
            if context > longest && matches!(manifest.task, Task::Generate(_)) {
                continue;
            }
            let request = Request { pictures: pictures.clone(), context, new_tokens: 1, threads: 2 };
            let needs = match needs(&manifest, Some(&program), &request) {
                Ok(needs) => needs,
                // The pictures alone are longer.
                Err(e) if e.to_string().contains("no room") && context < 8192 => continue,
                Err(e) => panic!("{}: {e}", preset.name),
            };
            for run in &needs.runs {
                let w = run.working.unwrap();
                let ratio = w.arena as f64 / w.largest_live.max(1) as f64;
                let symbols: Vec<String> = run.symbols.iter().filter(|(_, v)| *v > 1).map(|(n, v)| format!("{n}={v}")).collect();
                eprintln!(
                    "{:24} {:8} {:40} live {:12} arena {:12} scratch {:10} {ratio:.4}",
                    preset.name,
                    run.entry,
                    symbols.join(" "),
                    w.largest_live,
                    w.arena,
                    w.scratch
                );
                assert!(w.arena >= w.largest_live);
                worst = worst.max(ratio);
                ran += 1;
            }
        }
        assert!(ran > 0 || manifest.processor.is_none(), "{}: nothing was planned", preset.name);
    }
    assert!(worst <= 1.1, "a plan takes {worst} times what is alive");
}

fn vlmc(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlmc"));
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn json_of(out: std::process::Output) -> Value {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// What a command prints, and the peak of its resident memory (`VmHWM`), which is read every few milliseconds while it runs.
#[cfg(target_os = "linux")]
fn peak(args: &[&str]) -> (Value, f64) {
    let mut child = vlmc(args).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0.0f64;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = peak.max(line.map_or(0.0, |kib| kib.parse::<f64>().unwrap() * 1024.0));
        std::thread::sleep(Duration::from_millis(2));
    }
    (json_of(child.wait_with_output().unwrap()), peak)
}

/// A checkpoint of Qwen2-VL's structure whose pictures and prompts take far more memory than the process does without any.
fn checkpoint(out: &Path) {
    let preset = synth::preset("qwen2-vl-tiny").unwrap();
    let mut config = (preset.config)();
    let text = [("hidden_size", 256), ("intermediate_size", 8192), ("num_hidden_layers", 2)];
    text.into_iter().for_each(|(name, value)| config[name] = json!(value));
    config["rope_scaling"]["mrope_section"] = json!([8, 12, 12]);
    let vision = [("depth", 1), ("embed_dim", 256), ("mlp_ratio", 16), ("hidden_size", 256)];
    vision.into_iter().for_each(|(name, value)| config["vision_config"][name] = json!(value));
    synth::write(&config, &(preset.files)(), out, Some(0), &|_, _| {}).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_process_takes_what_inspect_tells() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    checkpoint(&dir.path().join("checkpoint"));
    let artifact = path("artifact");
    assert!(vlmc(&["compile", &path("checkpoint"), "-o", &artifact]).output().unwrap().status.success());

    // Figures of a request, measured and told.
    let figures = |side: u32, prompt: &str, new_tokens: &str| {
        let picture = path(&format!("{side}.png"));
        image::RgbImage::from_fn(side, side, |x, y| image::Rgb([x as u8, y as u8, (x * y) as u8])).save(&picture).unwrap();
        let run = ["run", &artifact, "--image", &picture, "--prompt", prompt, "--max-new-tokens", new_tokens, "--threads", "2", "--json"];
        let (reply, measured) = peak(&run);
        let size = format!("{side}x{side}");
        let context = (reply["prompt_tokens"].as_u64().unwrap() + reply["generated_tokens"].as_u64().unwrap() - 1).to_string();
        let made = reply["generated_tokens"].to_string();
        let inspect =
            ["inspect", &artifact, "--image", &size, "--context", &context, "--max-new-tokens", &made, "--threads", "2", "--json"];
        let told = json_of(vlmc(&inspect).output().unwrap())["request"].take();
        (measured, told["total_bytes"].as_f64().unwrap(), told)
    };
    // The program itself and its tokenizer, which are not told, are small against the request, and counted.
    for prompt in ["What is there?".to_string(), "word ".repeat(300)] {
        let (measured, told, all) = figures(1344, &prompt, "6");
        let ratio = measured / told;
        eprintln!("measured {measured}, told {told}: {ratio:.3}");
        assert!((0.9..=1.1).contains(&ratio), "{measured} measured, {told} told: {all:#}");
    }
}
