//! Inputs of a request against what an entry declares: shared by the engines.

use crate::{Error, Result, Tensor};
use std::fmt::Write;
use vlmc_artifact::{Bindings, Dim, Entry, Symbol};

/// Inputs in the entry's order, and the values of the symbols.
pub struct Bound<'t> {
    /// In the entry's order.
    pub inputs: Vec<&'t Tensor>,
    /// Values of the symbols.
    pub symbols: Bindings,
}

/// The shape that states have now, or none if they are empty.
pub type StateShape<'a> = Option<&'a [usize]>;

/// Matches `inputs` with the inputs of `entry` and finds the values of the symbols in their shapes.
///
/// # Errors
/// An input is missing, unknown or does not fit, or a symbol is out of its range.
pub fn bind<'t>(symbols: &[Symbol], entry: &Entry, inputs: &[(&str, &'t Tensor)], states: &[StateShape<'_>]) -> Result<Bound<'t>> {
    let fail = |message: String| Error::Input(format!("{}: {message}", entry.name));
    if let Some((name, _)) = inputs.iter().find(|(n, _)| !entry.inputs.iter().any(|p| p.name == *n)) {
        let known: Vec<_> = entry.inputs.iter().map(|p| p.name.as_str()).collect();
        return Err(fail(format!("unknown input '{name}'; inputs are {}", known.join(", "))));
    }
    let mut bound = Bound { inputs: vec![], symbols: Bindings::default() };
    for port in &entry.inputs {
        let Some((_, tensor)) = inputs.iter().find(|(n, _)| *n == port.name) else {
            return Err(fail(format!("input '{}' is missing", port.name)));
        };
        if tensor.dtype() != port.dtype || tensor.shape().len() != port.shape.len() {
            let declared = shape_text(&port.shape);
            return Err(fail(format!("input '{}' must be {}{declared}, is {}{:?}", port.name, port.dtype, tensor.dtype(), tensor.shape())));
        }
        solve(&port.shape, tensor.shape(), &mut bound.symbols);
        bound.inputs.push(tensor);
    }
    for (state, now) in entry.states.iter().zip(states) {
        match now {
            Some(shape) => solve(&state.shape, shape, &mut bound.symbols),
            None => {
                if let Some((_, symbol)) = state.shape.get(state.axis).and_then(Dim::as_scaled_symbol) {
                    bound.symbols.set(symbol, 0);
                }
            }
        }
    }
    in_range(symbols, &bound.symbols).map_err(fail)?;
    let check = |kind: &str, name: &str, declared: &[Dim], actual: &[usize]| {
        for (axis, (d, a)) in declared.iter().zip(actual).enumerate() {
            let wanted = d.eval(&bound.symbols).map_err(|e| Error::Input(format!("{}: {kind} '{name}': {e}", entry.name)))?;
            if wanted != *a as i64 {
                let known = bound.symbols.iter().fold(String::new(), |mut s, (n, v)| {
                    let _ = write!(s, " {n}={v}");
                    s
                });
                return Err(fail(format!("{kind} '{name}': axis {axis} must be {d} = {wanted} (with{known}), is {a}")));
            }
        }
        Ok::<_, Error>(())
    };
    for (port, tensor) in entry.inputs.iter().zip(&bound.inputs) {
        check("input", &port.name, &port.shape, tensor.shape())?;
    }
    for (state, now) in entry.states.iter().zip(states) {
        if let Some(shape) = now {
            check("state", &state.past, &state.shape, shape)?;
        }
    }
    Ok(bound)
}

/// Symbols that stand alone in `declared`, possibly with a factor, get the values that `actual` implies. What does not come out
/// even is left to the comparison that follows.
pub(crate) fn solve(declared: &[Dim], actual: &[usize], symbols: &mut Bindings) {
    for (d, a) in declared.iter().zip(actual) {
        if let Some((factor, symbol)) = d.as_scaled_symbol()
            && symbols.get(symbol).is_none()
            && factor > 0
        {
            symbols.set(symbol, *a as i64 / factor);
        }
    }
}

/// Whether the model takes these values.
pub(crate) fn in_range(symbols: &[Symbol], bound: &Bindings) -> Result<(), String> {
    let outside = |s: &&Symbol| bound.get(&s.name).is_some_and(|v| !(s.min..=s.max).contains(&v));
    symbols.iter().find(outside).map_or(Ok(()), |s| {
        let v = bound.get(&s.name).unwrap_or_default();
        Err(format!("{} is {v}, the model takes {} to {}", s.name, s.min, s.max))
    })
}

/// Values of dims.
pub(crate) fn extents(shape: &[Dim], symbols: &Bindings) -> Result<Vec<usize>, String> {
    let extent = |d: &Dim| {
        let v = d.eval(symbols).map_err(|e| e.to_string())?;
        usize::try_from(v).map_err(|_| format!("dim {d} is {v}"))
    };
    shape.iter().map(extent).collect()
}

pub(crate) fn shape_text(shape: &[Dim]) -> String {
    format!("[{}]", shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(", "))
}
