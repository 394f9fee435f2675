//! How much memory the plans of published models take, against the least that any plan could.

use std::fs;
use vlmc::{
    arch::{ARCHITECTURES, Preset},
    compile::Model,
};
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{Request, artifact::Task, of_program};

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
            let needs = match of_program(&manifest, Some(&program), &request) {
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
