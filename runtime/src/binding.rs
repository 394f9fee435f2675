//! Inputs of a request against what an entry declares: shared by the engines.

use crate::{Error, Result, Tensor};
use smallvec::SmallVec;
use std::fmt::Write;
use vlmc_artifact::{Bindings, Dim, Entry, Symbol};

/// Inputs in an entry's order.
pub type Inputs<'t> = SmallVec<[&'t Tensor; 16]>;

/// Matches `inputs` with the inputs of `entry` and finds the values of the symbols, `bound`, in their shapes and those that the
/// states have now, `states` by their places; an empty one has none.
///
/// # Errors
/// An input is missing, unknown or does not fit, or a symbol is out of its range.
pub fn bind<'t, S: AsRef<[usize]>>(
    symbols: &[Symbol],
    entry: &Entry,
    inputs: &[(&str, &'t Tensor)],
    states: impl Fn(usize) -> Option<S>,
    bound: &mut Bindings,
) -> Result<Inputs<'t>> {
    let fail = |message: String| Error::Input(format!("{}: {message}", entry.name));
    if let Some((name, _)) = inputs.iter().find(|(n, _)| !entry.inputs.iter().any(|p| p.name == *n)) {
        let known: Vec<_> = entry.inputs.iter().map(|p| p.name.as_str()).collect();
        return Err(fail(format!("unknown input '{name}'; inputs are {}", known.join(", "))));
    }
    bound.clear();
    let mut ordered = Inputs::new();
    for port in &entry.inputs {
        let Some((_, tensor)) = inputs.iter().find(|(n, _)| *n == port.name) else {
            return Err(fail(format!("input '{}' is missing", port.name)));
        };
        if tensor.dtype() != port.dtype || tensor.shape().len() != port.shape.len() {
            let declared = shape_text(&port.shape);
            return Err(fail(format!("input '{}' must be {}{declared}, is {}{:?}", port.name, port.dtype, tensor.dtype(), tensor.shape())));
        }
        solve(&port.shape, tensor.shape(), bound);
        ordered.push(tensor);
    }
    for (i, state) in entry.states.iter().enumerate() {
        match states(i) {
            Some(shape) => solve(&state.shape, shape.as_ref(), bound),
            None => {
                if let Some((_, symbol)) = state.shape.get(state.axis).and_then(Dim::as_scaled_symbol) {
                    bound.set(symbol, 0);
                }
            }
        }
    }
    in_range(symbols, bound).map_err(fail)?;
    let check = |kind: &str, name: &str, declared: &[Dim], actual: &[usize]| {
        for (axis, (d, a)) in declared.iter().zip(actual).enumerate() {
            let wanted = d.eval(bound).map_err(|e| Error::Input(format!("{}: {kind} '{name}': {e}", entry.name)))?;
            if wanted != *a as i64 {
                let known = bound.iter().fold(String::new(), |mut s, (n, v)| {
                    let _ = write!(s, " {n}={v}");
                    s
                });
                return Err(fail(format!("{kind} '{name}': axis {axis} must be {d} = {wanted} (with{known}), is {a}")));
            }
        }
        Ok::<_, Error>(())
    };
    for (port, tensor) in entry.inputs.iter().zip(&ordered) {
        check("input", &port.name, &port.shape, tensor.shape())?;
    }
    for (i, state) in entry.states.iter().enumerate() {
        if let Some(shape) = states(i) {
            check("state", &state.past, &state.shape, shape.as_ref())?;
        }
    }
    Ok(ordered)
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

/// Value of a dim.
pub(crate) fn extent(d: &Dim, symbols: &Bindings) -> Result<usize, String> {
    let v = d.eval(symbols).map_err(|e| e.to_string())?;
    usize::try_from(v).map_err(|_| format!("dim {d} is {v}"))
}

/// Values of dims.
pub(crate) fn extents(shape: &[Dim], symbols: &Bindings) -> Result<Vec<usize>, String> {
    shape.iter().map(|d| extent(d, symbols)).collect()
}

pub(crate) fn shape_text(shape: &[Dim]) -> String {
    format!("[{}]", shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(", "))
}
