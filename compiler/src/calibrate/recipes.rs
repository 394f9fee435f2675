//! Recipes that calibration has found, and how a program gets them.

use std::collections::BTreeMap;
use vlmc_ir::{
    DType, Program, Scheme,
    weights::{Recipe, WeightDef},
};

/// Recipes of weights.
#[derive(Default)]
pub(crate) struct Recipes {
    /// Of weights that are quantized in a scheme.
    pub(super) codes: BTreeMap<(String, Scheme), Recipe>,
    /// Of weights that change together or not at all.
    pub(super) folds: Vec<Folded>,
    /// Largest absolute numbers that layers read, by weight, for targets that round in static steps.
    pub(super) largest: BTreeMap<String, f32>,
}

/// Vectors of a norm that are divided by factors, and the layers that read it, whose columns are multiplied.
pub(super) struct Folded {
    pub(super) vectors: BTreeMap<String, Recipe>,
    /// In the schemes that they were scaled for.
    pub(super) readers: BTreeMap<String, (Scheme, Recipe)>,
}

impl Recipes {
    /// Whether there was no calibration, or it found nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.codes.is_empty() && self.folds.is_empty()
    }

    /// Whether there is one for a weight in a scheme.
    pub(crate) fn has(&self, name: &str, scheme: Scheme) -> bool {
        self.codes.contains_key(&(name.to_string(), scheme)) || self.folds.iter().any(|f| f.readers.contains_key(name))
    }

    /// The largest absolute number that the layer of a weight read.
    pub(crate) fn largest(&self, weight: &str) -> Option<f32> {
        self.largest.get(weight).copied()
    }

    /// Gives a quantized program the recipes that suit its schemes.
    pub(crate) fn apply(&self, program: &mut Program) {
        let mut found: BTreeMap<String, WeightDef> = BTreeMap::new();
        for ((name, scheme), recipe) in &self.codes {
            if let Some(w) = program.weights.get(name).filter(|w| w.dtype.scheme() == Some(*scheme)) {
                found.insert(name.clone(), WeightDef { recipe: recipe.clone(), ..w.clone() });
            }
        }
        let scheme = |name: &String| program.weights.get(name).and_then(|w| w.dtype.scheme());
        for fold in self.folds.iter().filter(|f| f.readers.iter().all(|(name, (s, _))| scheme(name) == Some(*s))) {
            for (name, (_, recipe)) in &fold.readers {
                found.extend(program.weights.get(name).map(|w| (name.clone(), WeightDef { recipe: recipe.clone(), ..w.clone() })));
            }
            for (name, recipe) in &fold.vectors {
                // Products do not fit the checkpoint's narrow types.
                let def = |w: &WeightDef| WeightDef { dtype: DType::F32, shape: w.shape.clone(), recipe: recipe.clone() };
                found.extend(program.weights.get(name).map(|w| (name.clone(), def(w))));
            }
        }
        program.map_weights(|name, w| found.get(name).unwrap_or(w).clone());
    }
}
