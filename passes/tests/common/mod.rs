//! Weights for programs that have no checkpoint.

use std::collections::BTreeMap;
use vlmc_ir::Program;

/// Small numbers without a pattern for every checkpoint tensor that a program reads: a tensor has as many elements as the
/// weights that are made of it alone.
pub(crate) fn drawn_weights(program: &Program) -> impl Fn(&str) -> Result<Vec<f32>, String> + use<> {
    let sizes = program.weights.values().filter_map(|w| match w.recipe.sources()[..] {
        [source] => Some((source.to_string(), w.elements() as usize)),
        _ => None,
    });
    let sizes: BTreeMap<String, usize> = sizes.collect();
    move |name| {
        let n = *sizes.get(name).ok_or_else(|| format!("nothing says how large '{name}' is"))?;
        let seed = name.bytes().fold(17u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let number = |i: usize| {
            let mixed = (seed ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        Ok((0..n).map(number).collect())
    }
}
