//! Published sizes: every preset of every architecture lowers from its config alone, to as many weights as published.

use vlmc::{arch::ARCHITECTURES, synth};

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
