//! Mixed precision: which weights keep more bits, by what fewer would cost.

use super::{Measured, Report};
use crate::{Error, Result, checkpoint::Checkpoint, compile::Model, verify::Request};
use std::collections::BTreeMap;
use vlmc_ir::{Def, Op, Program, Scheme, interp, quant::Method};
use vlmc_kernels::Isa;
use vlmc_passes::{
    Target,
    quantize::{Calibration, Choice, Part, Policy},
};

/// What a weight may be kept in: 3.125 (where the target reads that), 4.125, 4.5 and 8 bits, and a little more for scales of rows.
const SCHEMES: [Scheme; 4] = [Scheme::INT3G128, Scheme::INT4G128, Scheme::INT4, Scheme::INT8];

/// A policy within a budget.
pub struct Budgeted {
    /// The model, with codes if it was calibrated.
    pub model: Model,
    /// Names each weight that it chose for.
    pub policy: Policy,
    /// Bits per weight over these, scales counted.
    pub bits_per_weight: f64,
    /// Errors that it chose by.
    pub report: Report,
}

impl Model {
    /// Chooses a scheme for each linear layer of towers and decoder, for the experts of each layer, and the head, so that these have at most
    /// `budget` bits per weight, scales counted, and the sum of their relative squared errors is small: of outputs on `requests`, or
    /// if there are none, of weights. Tables of tokens get 8 bits; they and what is not quantized do not count.
    ///
    /// # Errors
    /// As [`Model::calibrate`], or the budget is too small.
    pub fn within_budget(self, target: &Target, budget: f64, requests: &[Request], progress: &dyn Fn(&str)) -> Result<Budgeted> {
        let schemes = |part: Part| match part {
            Part::First | Part::Router | Part::Table => vec![],
            // Towers compute more than they read, and of a head in 4 bits half is read.
            Part::Head | Part::Tower => SCHEMES[1..].to_vec(),
            Part::Decoder | Part::Experts => SCHEMES.to_vec(),
        };
        let candidates = |_: &str, part: Part| {
            schemes(part).into_iter().map(|s| Choice { calibration: Calibration::Gptq, ..Choice::new(s, true) }).collect()
        };
        let (model, report) = if requests.is_empty() {
            self.measure(target, &candidates, progress)?
        } else {
            self.calibrate(target, &candidates, requests, progress)?
        };
        let program = model.lower()?.program;
        let shape = |name: &String| program.weights.get(name).map_or(&[][..], |w| &w.shape);
        let (chosen, bits_per_weight) = choose(&report, &units(&program, &report), |name| shape(name), budget)?;
        Ok(Budgeted { policy: Policy::listing(&chosen)?, model, bits_per_weight, report })
    }

    /// Errors of the weights themselves.
    fn measure(self, target: &Target, candidates: super::Candidates<'_>, progress: &dyn Fn(&str)) -> Result<(Self, Report)> {
        let program = self.lower()?.program;
        let mut report = Report::new();
        for (name, choices) in self.choices(target, &program, candidates) {
            progress(&name);
            let def = program.weights.get(&name).ok_or_else(|| Error::tensor(&name, "is not declared"))?;
            let rows = weight(self.checkpoint(), def)?;
            let k = def.shape.last().copied().unwrap_or(1);
            let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v) * f64::from(v)).sum::<f64>();
            let all = squares(&mut rows.iter().copied());
            let measured = |c: &Choice| {
                let q = vlmc_kernels::quantize(Isa::detect(), &rows, k, c.scheme, Method::Search).dequantize(k, c.scheme);
                let error = squares(&mut rows.iter().zip(&q).map(|(w, q)| w - q));
                Measured { scheme: c.scheme, error: if all > 0.0 { (error / all).sqrt() } else { 0.0 } }
            };
            report.insert(name, choices.iter().map(measured).collect());
        }
        Ok((self, report))
    }
}

fn weight(checkpoint: &Checkpoint, def: &vlmc_ir::weights::WeightDef) -> Result<Vec<f32>> {
    let array = interp::weight(def, &|name: &str| checkpoint.floats(name).map_err(|e| e.to_string())).map_err(Error::Backend)?;
    Ok(array.f32().map_err(Error::Backend)?.iter().copied().collect())
}

/// Weights that have one scheme: the stacks of experts of a layer, which targets run together, and every other weight by itself.
fn units<'r>(program: &Program, report: &'r Report) -> Vec<Vec<&'r String>> {
    let mut first: BTreeMap<&String, &String> = BTreeMap::new();
    for (g, node) in program.graphs.iter().flat_map(|g| g.nodes().map(move |(_, n)| (g, n))) {
        let Op::Moe(_) = node.op else { continue };
        let names = node.args.iter().filter_map(|v| if let Def::Weight(name) = g.def(*v) { report.get_key_value(name) } else { None });
        let names: Vec<&String> = names.map(|(name, _)| name).collect();
        first.extend(names.iter().map(|name| (*name, names[0])));
    }
    let mut units: BTreeMap<&String, Vec<&String>> = BTreeMap::new();
    report.keys().for_each(|name| units.entry(first.get(name).copied().unwrap_or(name)).or_default().push(name));
    units.into_values().collect()
}

/// The scheme of each weight, and bits per weight over all. Greedy: from the fewest bits on, the step that takes most error off per bit,
/// as long as it fits.
fn choose<'s>(
    report: &Report,
    units: &[Vec<&String>],
    shape: impl Fn(&String) -> &'s [usize],
    budget: f64,
) -> Result<(BTreeMap<String, Scheme>, f64)> {
    let elements = |name: &String| shape(name).iter().product::<usize>() as f64;
    let bits = |name: &String, scheme: Scheme| elements(name) * scheme.bits_per_weight(shape(name).last().copied().unwrap_or(1));
    // Bits and squared error of a unit in a scheme, if all of its weights were measured in it.
    let point = |unit: &[&String], scheme: Scheme| {
        unit.iter().try_fold((0.0, 0.0, scheme), |sum, name| {
            let m = report.get(*name)?.iter().find(|m| m.scheme == scheme)?;
            Some((sum.0 + bits(name, scheme), sum.1 + m.error * m.error, scheme))
        })
    };
    let mut chosen: BTreeMap<String, Scheme> = BTreeMap::new();
    // Per unit, what pays: each step takes less error off per bit than the one before.
    let mut steps: Vec<(f64, usize, usize, Scheme, f64)> = vec![];
    let mut total = 0.0;
    for (i, unit) in units.iter().enumerate() {
        let schemes = unit.first().and_then(|name| report.get(*name)).into_iter().flatten().map(|m| m.scheme);
        let mut points: Vec<(f64, f64, Scheme)> = schemes.filter_map(|scheme| point(unit, scheme)).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let Some(mut at) = points.first().copied() else { continue };
        chosen.extend(unit.iter().map(|name| ((*name).clone(), at.2)));
        total += at.0;
        let gain = |from: (f64, f64, Scheme), to: &(f64, f64, Scheme)| (from.1 - to.1) / (to.0 - from.0);
        let mut order = 0;
        while let Some(next) =
            points.iter().filter(|p| p.0 > at.0 && p.1 < at.1).copied().max_by(|a, b| gain(at, a).total_cmp(&gain(at, b)))
        {
            steps.push((gain(at, &next), i, order, next.2, next.0 - at.0));
            order += 1;
            at = next;
        }
    }
    let all: f64 = report.keys().map(elements).sum::<f64>().max(1.0);
    if total > budget * all {
        return Err(Error::Budget { budget, least: total / all });
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let mut taken: BTreeMap<usize, usize> = BTreeMap::new();
    for (_, i, order, scheme, more) in steps {
        // A step counts from the one before it.
        if taken.get(&i).copied().unwrap_or(0) == order && total + more <= budget * all {
            total += more;
            chosen.extend(units[i].iter().map(|name| ((*name).clone(), scheme)));
            *taken.entry(i).or_default() += 1;
        }
    }
    Ok((chosen, total / all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sensitive_keep_more_bits() {
        let of = |errors: [f64; 4]| SCHEMES.iter().zip(errors).map(|(s, error)| Measured { scheme: *s, error }).collect::<Vec<_>>();
        let report: Report = [("a", [0.4, 0.2, 0.1, 0.01]), ("b", [0.04, 0.02, 0.01, 0.001]), ("c", [1.0, 0.5, 0.4, 0.02])]
            .map(|(n, e)| (n.to_string(), of(e)))
            .into();
        let shape = |_: &String| &[64usize, 1280][..];
        let names = |budget: f64| {
            let alone: Vec<Vec<&String>> = report.keys().map(|name| vec![name]).collect();
            let (chosen, bits) = choose(&report, &alone, shape, budget).unwrap();
            assert!(bits <= budget, "{bits} of {budget}");
            chosen.values().map(|s| s.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(3.2), ["int3g128", "int3g128", "int3g128"]);
        assert_eq!(names(3.5), ["int3g128", "int3g128", "int4g128"]);
        assert_eq!(names(4.2), ["int4g32", "int3g128", "int4g32"]);
        assert_eq!(names(5.6), ["int4g32", "int4g128", "int8"]);
        assert_eq!(names(9.0), ["int8", "int8", "int8"]);
        let together = [report.keys().take(2).collect::<Vec<_>>(), report.keys().skip(2).collect()];
        let (chosen, _) = choose(&report, &together, shape, 5.7).unwrap();
        assert_eq!(chosen.into_values().map(|s| s.to_string()).collect::<Vec<_>>(), ["int4g32", "int4g32", "int8"]);
        let error = choose(&report, &together, shape, 3.0).unwrap_err().to_string();
        assert!(error.contains("3.125"), "{error}");
    }
}
