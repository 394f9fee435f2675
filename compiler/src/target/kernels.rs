//! What execution providers have kernels for, from tables (`kernels/`) that `tools/kernels.py` makes.

use std::collections::BTreeMap;
use vlmc_passes::Target;

/// Types by a name: `T` of an operator's signature, or one type (`tensor(int64)`).
type Types<'t> = BTreeMap<&'t str, &'t str>;

/// Signature of an operator: types of its operands and results by parameter.
pub(crate) struct Signature {
    /// First version of the standard that has it.
    pub(crate) since: i64,
    inputs: Vec<&'static str>,
    outputs: Vec<&'static str>,
}

/// Kernels of one operator's versions, for some types.
struct Kernel {
    versions: std::ops::RangeInclusive<i64>,
    types: BTreeMap<&'static str, Vec<&'static str>>,
}

/// What a provider runs.
pub(crate) struct Kernels {
    /// Where the table comes from: its first line.
    pub(crate) source: &'static str,
    kernels: BTreeMap<&'static str, Vec<Kernel>>,
}

/// A line that has words is one of the table.
fn lines(table: &'static str) -> impl Iterator<Item = &'static str> {
    table.lines().filter(|l| !l.is_empty() && !l.starts_with('#'))
}

impl Kernels {
    /// Those of the target's provider; `None` if its artifacts are not ONNX.
    pub(crate) fn of(target: &Target) -> Option<Self> {
        let table = match target.name {
            "onnx-cpu" => include_str!("kernels/cpu.txt"),
            "onnx-cuda" => include_str!("kernels/cuda.txt"),
            "onnx-tensorrt" => include_str!("kernels/tensorrt.txt"),
            _ => return None,
        };
        let mut kernels = BTreeMap::<_, Vec<_>>::new();
        for line in lines(table) {
            let mut words = line.split(' ');
            let (Some(op), Some(versions)) = (words.next(), words.next()) else { continue };
            let (first, last) = versions.trim_end_matches('+').split_once('-').unwrap_or((versions.trim_end_matches('+'), ""));
            let number = |text: &str, open| text.parse().unwrap_or(open);
            let types = words.filter_map(|w| w.split_once('=')).map(|(p, types)| (p, types.split(',').collect())).collect();
            kernels.entry(op).or_default().push(Kernel { versions: number(first, 0)..=number(last, i64::MAX), types });
        }
        let source = table.lines().next().unwrap_or_default().trim_start_matches("# ").trim_end_matches('.');
        Some(Self { source, kernels })
    }

    /// Why nothing runs `op` of that version with these types, if so.
    pub(crate) fn refusal(&self, op: &str, since: i64, types: &Types<'_>) -> Option<String> {
        let Some(kernels) = self.kernels.get(op) else { return Some("there is no such operator".into()) };
        let kernels: Vec<&Kernel> = kernels.iter().filter(|k| k.versions.contains(&since)).collect();
        if kernels.is_empty() {
            return Some(format!("version {since} of the operator is not there"));
        }
        let wrong = |k: &Kernel| types.iter().filter(|(p, t)| k.types.get(*p).is_some_and(|known| !known.contains(t))).count();
        let nearest = kernels.into_iter().min_by_key(|k| wrong(k))?;
        let (parameter, found) = types.iter().find(|(p, t)| nearest.types.get(*p).is_some_and(|known| !known.contains(t)))?;
        let known = nearest.types.get(parameter).map_or_else(String::new, |known| known.join(", "));
        Some(format!("{parameter} is {found}, and may be {known}"))
    }
}

impl Signature {
    /// That of an operator in a version of the standard.
    pub(crate) fn of(op: &str, opset: i64) -> Option<Self> {
        let signature = |line: &'static str| {
            let (head, rest) = line.split_once(": ")?;
            let (name, since) = head.split_once(' ')?;
            let since = since.parse().ok().filter(|since| name == op && *since <= opset)?;
            let (inputs, outputs) = rest.split_once(" -> ")?;
            let list = |text: &'static str| text.split(", ").collect();
            Some(Self { since, inputs: list(inputs), outputs: list(outputs) })
        };
        lines(include_str!("kernels/operators.txt")).filter_map(signature).max_by_key(|s| s.since)
    }

    /// Parameter of operand `i`, of which the last may be repeated; `None` if there is no such operand.
    pub(crate) fn input(&self, i: usize) -> Option<&'static str> {
        let last = self.inputs.last().filter(|p| p.ends_with("..."));
        self.inputs.get(i).or(last).map(|p| p.trim_end_matches("..."))
    }

    /// Parameter of result `i`.
    pub(crate) fn output(&self, i: usize) -> Option<&'static str> {
        self.outputs.get(i).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operator of a table has a signature and kernels, and the table says where it comes from.
    #[test]
    fn tables_are_whole() {
        let mut tables = 0;
        for target in crate::target::TARGETS {
            let Some(table) = Kernels::of(target) else { continue };
            assert!(table.source.contains(": "), "{}", table.source);
            assert!(table.kernels.len() > 40);
            for (op, kernels) in &table.kernels {
                let signature = Signature::of(op, 23).unwrap_or_else(|| panic!("{op}"));
                assert!(kernels.iter().any(|k| k.versions.contains(&signature.since)), "{}: {op}", target.name);
            }
            tables += 1;
        }
        assert_eq!(tables, 3);
    }
}
