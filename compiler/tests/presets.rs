//! Published sizes: every preset of every architecture lowers from its config alone, to as many weights as published.

use std::fs;
use vlmc::{arch::ARCHITECTURES, compile::Model, synth};

#[test]
fn presets_have_the_published_number_of_weights() {
    let mut wrong = vec![];
    for preset in ARCHITECTURES.iter().flat_map(|a| a.presets) {
        match synth::parameters(&(preset.config)()) {
            Ok(n) if n == preset.parameters => {}
            Ok(n) => wrong.push(format!("{}: {n} weights instead of {}", preset.name, preset.parameters)),
            Err(e) => wrong.push(format!("{}: {e}", preset.name)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A model's forward pass, to be read: the graphs of the first size of every architecture.
#[test]
fn graphs_as_text() {
    for preset in ARCHITECTURES.iter().map(|a| &a.presets[0]) {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        fs::write(&config, serde_json::to_vec(&(preset.config)()).unwrap()).unwrap();
        let lowered = Model::from_config(&config).unwrap().lower().unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        assert_eq!(lowered.unknown, Vec::<String>::new(), "{}", preset.name);
        let text = lowered.program.to_string();
        insta::assert_snapshot!(format!("ir_{}", preset.name), text);
        assert_eq!(vlmc_ir::text::parse(&text).unwrap_or_else(|e| panic!("{}: {e}", preset.name)).to_string(), text, "{}", preset.name);
    }
}
