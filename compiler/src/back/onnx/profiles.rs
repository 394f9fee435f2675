//! Optimisation profiles of TensorRT: the shapes that it builds kernels for, from the ranges of the symbols. ONNX Runtime takes them
//! as options of its provider, `trtexec` as arguments.

use crate::{Error, Result};
use std::collections::BTreeMap;
use vlmc_artifact::{Bindings, Dim, Entry, Symbol};

/// How many of a thing a profile allows at most: TensorRT takes memory for the largest shapes.
const MOST: [(&str, i64); 6] = [("batch", 8), ("images", 8), ("pictures", 8), ("texts", 64), ("tiles", 64), ("tiles_past", 64)];
/// Symbols that follow the size of a picture, and where one profile ends and the next begins: about 450, 900 and 1800 pixels squared.
const SIZES: [&str; 2] = ["image_tokens", "patches"];
const EDGES: [i64; 3] = [256, 1024, 4096];
/// Length that kernels are tuned for, of texts and pictures.
const USUAL: i64 = 1024;

/// Least, usual and largest values of the symbols of a graph. The least may be 0, for a cache without positions and for no positions
/// to be scored: profiles take empty tensors since TensorRT 8 (of 7, issue 337 of NVIDIA/TensorRT), and its layers give them no special
/// treatment, as the developer guide says ("Working with Empty Tensors"). Who binds one must give it an address all the same.
type Profile = [Bindings; 3];

/// Names of the three in options and arguments.
const PARTS: [&str; 3] = ["min", "opt", "max"];

/// Of a graph with a cache one profile for prompts and one for single tokens, of a tower one for each of some sizes of pictures.
fn profiles(symbols: &[Symbol], entry: &Entry) -> Vec<Profile> {
    let range = |s: &Symbol| {
        let most = MOST.iter().find(|(name, _)| *name == s.name);
        let max = most.map_or(s.max, |(_, most)| s.max.min(*most));
        let usual = if most.is_some() || s.name == "scored" { 1 } else { USUAL };
        [s.min, usual.clamp(s.min, max), max]
    };
    let profile = |name: &str, values: [i64; 3]| -> Profile {
        let value = |s: &Symbol, i: usize| match s.name.as_str() {
            n if n == name => values[i],
            // No more positions than there are.
            "scored" if name == "seq" => range(s)[i].min(values[i]),
            _ => range(s)[i],
        };
        [0, 1, 2].map(|i| symbols.iter().map(|s| (s.name.as_str(), value(s, i))).collect())
    };
    let is = |d: &Dim, s: &Symbol| d.as_scaled_symbol().is_some_and(|(_, name)| name == s.name);
    let occurs = |s: &&Symbol| shapes(entry).any(|(_, shape)| shape.iter().any(|d| is(d, s)));
    if let Some(s) = symbols.iter().find(|s| s.name == "seq").filter(|_| !entry.states.is_empty()) {
        let [_, usual, max] = range(s);
        return vec![profile("seq", [1, 1, 1]), profile("seq", [2.min(max), usual, max])];
    }
    if let Some(s) = symbols.iter().find(|s| SIZES.contains(&s.name.as_str())).filter(occurs) {
        let mut from = s.min;
        let ends = EDGES.into_iter().filter(|e| (s.min..s.max).contains(e)).chain([s.max]);
        return ends
            .map(|to| {
                let profile = profile(&s.name, [from, to, to]);
                from = to + 1;
                profile
            })
            .collect();
    }
    vec![profile("", [0; 3])]
}

fn shapes(entry: &Entry) -> impl Iterator<Item = (&str, &[Dim])> {
    let inputs = entry.inputs.iter().map(|p| (p.name.as_str(), p.shape.as_slice()));
    inputs.chain(entry.states.iter().map(|s| (s.past.as_str(), s.shape.as_slice())))
}

/// `name:2x3,...` of all inputs, for one part of a profile.
fn written(entry: &Entry, symbols: &Bindings) -> Result<String> {
    let one = |(name, shape): (&str, &[Dim])| {
        let dims = shape.iter().map(|d| d.eval(symbols).map(|v| v.to_string())).collect::<Result<Vec<_>, _>>();
        Ok(format!("{name}:{}", dims.map_err(|e| Error::Backend(format!("{}: '{name}': {e}", entry.name)))?.join("x")))
    };
    Ok(shapes(entry).map(one).collect::<Result<Vec<_>>>()?.join(","))
}

/// Options of ONNX Runtime's TensorRT provider: the shapes of all profiles, one after the other.
///
/// # Errors
/// A shape has a symbol without range: a bug.
pub fn provider_options(symbols: &[Symbol], entry: &Entry) -> Result<BTreeMap<String, String>> {
    let profiles = profiles(symbols, entry);
    let option = |(i, part): (usize, &str)| {
        let all = profiles.iter().map(|p| written(entry, &p[i])).collect::<Result<Vec<_>>>()?;
        Ok((format!("trt_profile_{part}_shapes"), all.join(",")))
    };
    PARTS.into_iter().enumerate().map(option).collect()
}

/// A command that builds an engine from the entry's graph, with TensorRT alone.
///
/// # Errors
/// As [`provider_options`].
pub fn trtexec(symbols: &[Symbol], entry: &Entry) -> Result<String> {
    let mut command = format!("trtexec --onnx={} --stronglyTyped --saveEngine={}.engine", entry.file, entry.name);
    for (n, profile) in profiles(symbols, entry).iter().enumerate() {
        command += &format!(" --profile={n}");
        for (part, symbols) in PARTS.iter().zip(profile) {
            command += &format!(" --{part}Shapes={}", written(entry, symbols)?);
        }
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmc_artifact::{DType, Port, State};

    fn entry(inputs: &[(&str, &[&str])], states: &[&str]) -> Entry {
        let shape = |dims: &[&str]| dims.iter().map(|d| d.parse::<i64>().map_or_else(|_| Dim::symbol(d), Dim::from)).collect::<Vec<_>>();
        Entry {
            name: "decoder".into(),
            file: "decoder.onnx".into(),
            inputs: inputs.iter().map(|(n, s)| Port { name: (*n).into(), dtype: DType::F32, shape: shape(s) }).collect(),
            outputs: vec![],
            states: states
                .iter()
                .map(|n| State {
                    past: (*n).into(),
                    present: "p".into(),
                    dtype: DType::F16,
                    shape: shape(&["batch", "past", "8"]),
                    axis: 1,
                    in_place: false,
                })
                .collect(),
            arena: None,
            provider_options: BTreeMap::new(),
        }
    }

    fn symbols(ranges: &[(&str, i64, i64)]) -> Vec<Symbol> {
        ranges.iter().map(|(name, min, max)| Symbol { name: (*name).into(), min: *min, max: *max }).collect()
    }

    #[test]
    fn one_token_or_many() {
        let symbols = symbols(&[("batch", 1, 1024), ("seq", 1, 32768), ("past", 0, 32768)]);
        let decoder = entry(&[("x", &["batch", "seq", "64"])], &["past.0"]);
        let options = provider_options(&symbols, &decoder).unwrap();
        assert_eq!(options["trt_profile_min_shapes"], "x:1x1x64,past.0:1x0x8,x:1x2x64,past.0:1x0x8");
        assert_eq!(options["trt_profile_opt_shapes"], "x:1x1x64,past.0:1x1024x8,x:1x1024x64,past.0:1x1024x8");
        assert_eq!(options["trt_profile_max_shapes"], "x:8x1x64,past.0:8x32768x8,x:8x32768x64,past.0:8x32768x8");
        assert_eq!(
            trtexec(&symbols, &entry(&[("x", &["batch", "3"])], &[])).unwrap(),
            "trtexec --onnx=decoder.onnx --stronglyTyped --saveEngine=decoder.engine --profile=0 --minShapes=x:1x3 --optShapes=x:1x3 --maxShapes=x:8x3"
        );
    }

    #[test]
    fn sizes_of_pictures() {
        let tower = entry(&[("x", &["image_tokens", "64"])], &[]);
        let options = |max| provider_options(&symbols(&[("image_tokens", 1, max)]), &tower).unwrap();
        assert_eq!(options(2000)["trt_profile_min_shapes"], "x:1x64,x:257x64,x:1025x64");
        assert_eq!(options(2000)["trt_profile_max_shapes"], "x:256x64,x:1024x64,x:2000x64");
        assert_eq!(options(256)["trt_profile_max_shapes"], "x:256x64");
    }
}
