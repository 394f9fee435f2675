//! The type rules of kernels: what a program must satisfy so that running it cannot go out of bounds. Programs come from
//! disk and may be anything.

use vlmc_artifact::{
    DType, Dim,
    program::{Binary, Function, Kernel, Layout, Mask, Place, Program, Reduce, Step, Unary, Value},
};

/// Most axes of a value.
const MAX_RANK: usize = 8;
/// Most steps of a function: to place their results takes time that grows with the square of their number.
const MAX_STEPS: usize = 1 << 14;

type Check = Result<(), String>;

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(message()) }
}

/// Checks all functions.
pub(super) fn program(p: &Program) -> Check {
    p.functions.iter().try_for_each(|f| function(p, f).map_err(|why| format!("function '{}': {why}", f.name)))
}

fn function(p: &Program, f: &Function) -> Check {
    for (i, v) in f.values.iter().enumerate() {
        value(p, f, v).map_err(|why| format!("value {i}: {why}"))?;
    }
    for (i, port) in f.inputs.iter().enumerate() {
        let v = get(f, port.value)?;
        ensure(v.place == Place::Input(i as u32), || format!("input '{}' lies elsewhere", port.name))?;
    }
    for port in &f.outputs {
        let v = get(f, port.value)?;
        ensure(!matches!(v.place, Place::State(_)), || format!("output '{}' is a state", port.name))?;
        ensure(is_plain(v.dtype), || format!("output '{}' is {}", port.name, v.dtype))?;
    }
    for s in &f.states {
        ensure(s.shape.len() == 4 && s.axis == 2, || {
            format!("state '{}' must be [batch, heads, past, width] and grow along axis 2", s.name)
        })?;
        ensure(matches!(s.dtype, DType::F32 | DType::BF16 | DType::I8), || format!("state '{}' cannot be kept in {}", s.name, s.dtype))?;
    }
    ensure(f.steps.len() <= MAX_STEPS, || format!("has {} steps, at most {MAX_STEPS} are possible", f.steps.len()))?;
    let mut appended = vec![false; f.states.len()];
    let mut written = vec![false; f.values.len()];
    for (i, step) in f.steps.iter().enumerate() {
        let scope = if step.scope.is_empty() { String::new() } else { format!(" ({})", step.scope) };
        check_step(f, step, &mut appended, &mut written).map_err(|why| format!("step {i}{scope}: {why}"))?;
    }
    ensure(appended.iter().all(|a| *a), || "a state is never appended to".into())?;
    for port in &f.outputs {
        ensure(is_there(get(f, port.value)?, &written), || format!("output '{}' is never computed", port.name))?;
    }
    Ok(())
}

fn get(f: &Function, i: u32) -> Result<&Value, String> {
    f.values.get(i as usize).ok_or_else(|| format!("there is no value {i}"))
}

/// Whether a value has elements: what lies in a slot has them once a step has written it.
fn is_there(v: &Value, written: &[bool]) -> bool {
    !matches!(v.place, Place::Slot(i) if !written[i as usize])
}

fn is_plain(d: DType) -> bool {
    matches!(d, DType::F32 | DType::I64 | DType::Bool)
}

pub(super) fn elements(shape: &[Dim]) -> Dim {
    shape.iter().fold(Dim::from(1), |n, d| &n * d)
}

fn value(p: &Program, f: &Function, v: &Value) -> Check {
    ensure(v.shape.len() <= MAX_RANK, || format!("has {} axes, at most {MAX_RANK} are possible", v.shape.len()))?;
    let exists = |i: u32, n: usize, what: &str| ensure((i as usize) < n, || format!("there is no {what} {i}"));
    match &v.place {
        Place::Input(i) => {
            exists(*i, f.inputs.len(), "input")?;
            let port = get(f, f.inputs[*i as usize].value)?;
            ensure(port.dtype == v.dtype && elements(&port.shape) == elements(&v.shape), || "is not the input it shows".into())?;
            ensure(is_plain(v.dtype), || format!("an input cannot be {}", v.dtype))
        }
        Place::Slot(i) => {
            exists(*i, f.values.len(), "slot")?;
            ensure(is_plain(v.dtype), || format!("a result cannot be {}", v.dtype))
        }
        Place::Weight(i) => {
            exists(*i, p.weights.len(), "weight")?;
            let w = &p.weights[*i as usize];
            let shape: Vec<Dim> = w.shape.iter().map(|d| Dim::from(*d)).collect();
            // What lies in rows may be seen in another shape.
            let same = w.dtype == v.dtype && (shape == v.shape || w.layout == Layout::Rows && elements(&shape) == elements(&v.shape));
            ensure(same, || format!("is not the weight '{}'", w.name))
        }
        Place::Literal(data) => {
            ensure(is_plain(v.dtype), || format!("a literal cannot be {}", v.dtype))?;
            let n = elements(&v.shape).as_const();
            ensure(n == Some(data.len() as i64), || format!("a literal of {} elements cannot have this shape", data.len()))
        }
        Place::State(i) => {
            exists(*i, f.states.len(), "state")?;
            let s = &f.states[*i as usize];
            let same =
                v.shape.len() == s.shape.len() && v.shape.iter().zip(&s.shape).enumerate().all(|(axis, (a, b))| axis == s.axis || a == b);
            ensure(same && v.dtype == DType::F32, || format!("is not the state '{}'", s.name))
        }
    }
}

/// Operands that the kernel may overwrite with its first result.
fn in_place(kernel: &Kernel) -> &'static [usize] {
    match kernel {
        Kernel::Unary { .. } | Kernel::LayerNorm { .. } | Kernel::RmsNorm { .. } => &[0],
        Kernel::Binary { .. } | Kernel::AddLayerNorm { .. } | Kernel::AddRmsNorm { .. } => &[0, 1],
        _ => &[],
    }
}

fn check_step(f: &Function, step: &Step, appended: &mut [bool], written: &mut [bool]) -> Check {
    let args = step.args.iter().map(|a| get(f, *a)).collect::<Result<Vec<_>, _>>()?;
    let outs = step.outs.iter().map(|o| get(f, *o)).collect::<Result<Vec<_>, _>>()?;
    for (i, a) in args.iter().enumerate() {
        ensure(is_there(a, written), || format!("operand {i} is not computed yet"))?;
        if let Place::State(s) = a.place {
            let reads = matches!(step.kernel, Kernel::Attention { .. }) && (i == 1 || i == 2) && appended[s as usize];
            ensure(reads, || format!("operand {i} is a state, which only attention reads, after it was appended to"))?;
        }
        if let (Place::Weight(_), false) = (&a.place, is_plain(a.dtype)) {
            let widens = matches!(
                (&step.kernel, i),
                (Kernel::Linear { .. } | Kernel::GatedLinear { .. }, 1) | (Kernel::Embedding, 0) | (Kernel::Moe { .. }, 3..=5)
            );
            ensure(widens, || format!("operand {i} is {}, which this kernel does not widen", a.dtype))?;
        }
    }
    let (out, second) = match (&step.kernel, &outs[..]) {
        (Kernel::Append, [out]) => {
            let [new] = args[..] else { return Err(format!("takes 1 operand, got {}", args.len())) };
            return check_append(f, new, out, appended);
        }
        (Kernel::AddLayerNorm { .. } | Kernel::AddRmsNorm { .. }, [sum, normed]) => (sum, Some(normed)),
        (Kernel::GatedLinear { .. }, [out, product]) => (out, Some(product)),
        (Kernel::RotaryAttention { .. }, [out, keys, values]) => {
            ensure(args.len() >= 5, || format!("takes at least 5 operands, got {}", args.len()))?;
            check_append(f, args[1], keys, appended)?;
            let rotated = matches!(keys.place, Place::State(s) if f.states[s as usize].dtype == DType::F32);
            ensure(rotated, || "rotated keys must be kept in f32".into())?;
            check_append(f, args[2], values, appended)?;
            (out, None)
        }
        (Kernel::AddLayerNorm { .. } | Kernel::AddRmsNorm { .. } | Kernel::GatedLinear { .. } | Kernel::RotaryAttention { .. }, _)
        | (_, [] | [_, _, ..]) => {
            return Err(format!("cannot have {} results", outs.len()));
        }
        (_, [out]) => (out, None),
    };
    let overwrites = || "a result overwrites an operand or another result".to_string();
    let slot = |v: &Value| if let Place::Slot(s) = v.place { Ok(s) } else { Err("a result must lie in a slot") };
    let first = slot(out)?;
    written[first as usize] = true;
    let aliases: Vec<usize> = (0..args.len()).filter(|i| args[*i].place == Place::Slot(first)).collect();
    let fits = match aliases[..] {
        [] => true,
        [i] => in_place(&step.kernel).contains(&i) && args[i].shape == out.shape && args[i].dtype == out.dtype,
        _ => false,
    };
    ensure(fits, overwrites)?;
    let types = |v: &Value, (dtype, shape): (DType, Vec<Dim>)| {
        let message = || format!("gives {dtype}[{}]", shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(", "));
        ensure(v.dtype == dtype && v.shape == shape, message)
    };
    let first_type = match &step.kernel {
        Kernel::RotaryAttention { scale, mask, bf16 } => {
            for x in [args[0], args[1]] {
                result(&Kernel::Rotary, &[x, args[3], args[4]], x)?;
            }
            let attention = Kernel::Attention { scale: *scale, mask: *mask, bf16: *bf16 };
            result(&attention, &[&[args[0], outs[1], outs[2]], &args[5..]].concat(), out)?
        }
        Kernel::GatedLinear { act, .. } => result(&Kernel::Gated { act: *act }, &[outs[1]], out)?,
        kernel => result(kernel, &args, out)?,
    };
    if let Some(second) = second {
        let other = slot(second)?;
        written[other as usize] = true;
        ensure(other != first && args.iter().all(|a| a.place != Place::Slot(other)), overwrites)?;
        let second_type = match &step.kernel {
            Kernel::GatedLinear { dynamic, .. } => result(&Kernel::Linear { dynamic: *dynamic, act: None }, &args, second)?,
            _ => first_type.clone(),
        };
        types(second, second_type)?;
    }
    types(out, first_type)
}

/// Whether `new` may be appended to the state `out`, for the first time.
fn check_append(f: &Function, new: &Value, out: &Value, appended: &mut [bool]) -> Check {
    let Place::State(s) = out.place else { return Err("the result must be a state".into()) };
    let decl = &f.states[s as usize];
    ensure(!std::mem::replace(&mut appended[s as usize], true), || format!("state '{}' is appended to twice", decl.name))?;
    ensure(!matches!(new.place, Place::State(_)), || "a state cannot be appended to another".into())?;
    ensure(new.dtype == DType::F32 && new.shape.len() == 4, || "the operand must be f32[batch, heads, s, width]".into())?;
    let mut grown = decl.shape.clone();
    grown[2] = &grown[2] + &new.shape[2];
    let same = [0, 1, 3].iter().all(|i| new.shape[*i] == decl.shape[*i]) && out.shape == grown;
    ensure(same, || format!("does not fit the state '{}'", decl.name))
}

fn broadcast(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, String> {
    let rank = a.len().max(b.len());
    let one = Dim::from(1);
    let at = |s: &[Dim], i: usize| (i + s.len()).checked_sub(rank).map_or(one.clone(), |i| s[i].clone());
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y || y == one => Ok(x),
            (x, y) if x == one => Ok(y),
            (x, y) => Err(format!("dims {x} and {y} do not broadcast")),
        })
        .collect()
}

/// Type of the result. `out` gives what is not in the kernel: target shape of a broadcast, length of a slice.
fn result(kernel: &Kernel, args: &[&Value], out: &Value) -> Result<(DType, Vec<Dim>), String> {
    let count = |n: usize| ensure(args.len() == n, || format!("takes {n} operands, got {}", args.len()));
    let dtype = |i: usize, d: DType| ensure(args[i].dtype == d, || format!("operand {i} must be {d}, is {}", args[i].dtype));
    let rank = |i: usize, n: usize| ensure(args[i].shape.len() >= n, || format!("operand {i} needs at least {n} axes"));
    let shape = |i: usize, s: &[Dim]| ensure(args[i].shape == s, || format!("operand {i} has the wrong shape"));
    let axis = |i: usize, a: usize| ensure(a < args[i].shape.len(), || format!("operand {i} has no axis {a}"));
    let no_panels = |i: usize| ensure(!matches!(args[i].place, Place::State(_)), || format!("operand {i} cannot be a state"));
    let float = |i: usize| ensure(args[i].dtype.is_float(), || format!("operand {i} must be of floats, is {}", args[i].dtype));
    let quantized = |i: usize| args[i].dtype.scheme().is_some();
    let plain = |i: usize| ensure(is_plain(args[i].dtype), || format!("operand {i} cannot be {}", args[i].dtype));
    (0..args.len()).try_for_each(|i| if matches!(kernel, Kernel::Attention { .. }) { Ok(()) } else { no_panels(i) })?;
    let finite = |v: f64| ensure(v.is_finite(), || format!("{v} is not a finite number"));

    Ok(match kernel {
        Kernel::Linear { act, dynamic } => {
            ensure(*act != Some(Unary::Not), || "the activation must be one of floats".into())?;
            ensure(matches!(args.len(), 2 | 3), || format!("takes 2 or 3 operands, got {}", args.len()))?;
            dtype(0, DType::F32)?;
            rank(0, 1)?;
            float(1)?;
            ensure(!dynamic || quantized(1), || format!("operand 1 must be quantized if operand 0 is rounded, is {}", args[1].dtype))?;
            ensure(args[1].shape.len() == 2 && matches!(args[1].place, Place::Weight(_)), || {
                "operand 1 must be a weight with 2 axes".into()
            })?;
            ensure(args[0].shape.last() == args[1].shape.last(), || "the last dims of operands 0 and 1 differ".into())?;
            let n = args[1].shape[0].clone();
            if args.len() == 3 {
                dtype(2, DType::F32)?;
                shape(2, std::slice::from_ref(&n))?;
            }
            let mut s = args[0].shape.clone();
            s.pop();
            s.push(n);
            (DType::F32, s)
        }
        Kernel::Embedding => {
            count(2)?;
            float(0)?;
            ensure(args[0].shape.len() == 2 && matches!(args[0].place, Place::Weight(_)), || {
                "operand 0 must be a weight with 2 axes".into()
            })?;
            dtype(1, DType::I64)?;
            let mut s = args[1].shape.clone();
            s.push(args[0].shape[1].clone());
            (DType::F32, s)
        }
        Kernel::LayerNorm { eps } | Kernel::RmsNorm { eps } | Kernel::AddLayerNorm { eps } | Kernel::AddRmsNorm { eps } => {
            let vectors = if matches!(kernel, Kernel::LayerNorm { .. } | Kernel::AddLayerNorm { .. }) { 2 } else { 1 };
            let adds = matches!(kernel, Kernel::AddLayerNorm { .. } | Kernel::AddRmsNorm { .. });
            let rows = if adds { 2 } else { 1 };
            count(rows + vectors)?;
            finite(*eps)?;
            (0..rows + vectors).try_for_each(|i| dtype(i, DType::F32))?;
            rank(0, 1)?;
            (1..rows).try_for_each(|i| shape(i, &args[0].shape))?;
            let n = &args[0].shape[args[0].shape.len() - 1..];
            (rows..rows + vectors).try_for_each(|i| shape(i, n))?;
            (DType::F32, args[0].shape.clone())
        }
        Kernel::Gated { act } => {
            count(1)?;
            ensure(*act != Unary::Not, || "the activation must be one of floats".into())?;
            dtype(0, DType::F32)?;
            rank(0, 1)?;
            let mut s = args[0].shape.clone();
            let half = s.pop().and_then(|n| n.exact_div(&2.into())).ok_or("the last axis has no halves")?;
            s.push(half);
            (DType::F32, s)
        }
        Kernel::Rotary => {
            count(3)?;
            (0..3).try_for_each(|i| dtype(i, DType::F32))?;
            rank(0, 3)?;
            let (lead, last) = args[0].shape.split_at(args[0].shape.len() - 3);
            let half = last[2].exact_div(&2.into()).ok_or("the width of a head is odd")?;
            let angles = [lead, &[last[1].clone(), half]].concat();
            shape(1, &angles)?;
            shape(2, &angles)?;
            (DType::F32, args[0].shape.clone())
        }
        Kernel::Attention { scale, mask, .. } => {
            count(if *mask == Mask::Full { 3 } else { 4 })?;
            finite(*scale)?;
            (0..3).try_for_each(|i| dtype(i, DType::F32))?;
            rank(0, 3)?;
            rank(1, 3)?;
            let (lead, q) = args[0].shape.split_at(args[0].shape.len() - 3);
            let (_, k) = args[1].shape.split_at(args[1].shape.len() - 3);
            shape(1, &[lead, &[k[0].clone(), k[1].clone(), q[2].clone()]].concat())?;
            rank(2, 3)?;
            let dv = args[2].shape[args[2].shape.len() - 1].clone();
            shape(2, &[lead, &[k[0].clone(), k[1].clone(), dv.clone()]].concat())?;
            let heads = (q[0].as_const(), k[0].as_const());
            ensure(matches!(heads, (Some(h), Some(kv)) if kv > 0 && h % kv == 0), || "heads must be a multiple of kv heads".into())?;
            match mask {
                Mask::Full => {}
                Mask::Causal => {
                    dtype(3, DType::I64)?;
                    ensure(lead.len() == 1, || "operand 0 must have 4 axes".into())?;
                    shape(3, &[lead[0].clone(), k[1].clone()])?;
                }
                Mask::Segments => {
                    dtype(3, DType::I64)?;
                    ensure(q[1] == k[1], || "segments need as many queries as keys".into())?;
                    shape(3, &k[1..2])?;
                }
                Mask::Given => {
                    ensure(matches!(args[3].dtype, DType::Bool | DType::F32), || "operand 3 must be bool or f32".into())?;
                    ensure(lead.len() <= 1, || "operand 0 has too many axes".into())?;
                    let scores = [lead, &[q[0].clone(), q[1].clone(), k[1].clone()]].concat();
                    ensure(broadcast(&args[3].shape, &scores)? == scores, || "operand 3 does not fit the scores".into())?;
                }
            }
            (DType::F32, [lead, &[q[0].clone(), q[1].clone(), dv]].concat())
        }
        Kernel::PackedAttention { heads, kv_heads, scale, mask, bf16 } => {
            let operands = 1 + usize::from(*mask != Mask::Full);
            ensure(args.len() == operands || args.len() == operands + 2, || {
                format!("takes {operands} operands, and 2 angles or none, got {}", args.len())
            })?;
            rank(0, 2)?;
            let (lead, [s, width]) = args[0].shape.split_at(args[0].shape.len() - 2) else { return Err("operand 0 needs 2 axes".into()) };
            let all = &(&Dim::from(*heads) + *kv_heads) + *kv_heads;
            // Heads without elements could be any number.
            let d = width.exact_div(&all).filter(|d| d.as_const().is_some_and(|d| d > 0));
            let d = d.ok_or_else(|| format!("the width of operand 0 is no multiple of {all} heads"))?;
            let of = |n: usize| Value { shape: [lead, &[n.into(), s.clone(), d.clone()]].concat(), ..args[0].clone() };
            let (q, k) = (of(*heads), of(*kv_heads));
            let (angles, mask_operand) = args[1..].split_at(args.len() - operands);
            if !angles.is_empty() {
                result(&Kernel::Rotary, &[&[&q], angles].concat(), out)?;
            }
            let attention = Kernel::Attention { scale: *scale, mask: *mask, bf16: *bf16 };
            result(&attention, &[&[&q, &k, &k], mask_operand].concat(), out)?;
            (DType::F32, [lead, &[s.clone(), &d * *heads]].concat())
        }
        Kernel::Append | Kernel::RotaryAttention { .. } | Kernel::GatedLinear { .. } => return Err("is not checked here".into()),
        Kernel::Unary { f } => {
            count(1)?;
            let d = if *f == Unary::Not { DType::Bool } else { DType::F32 };
            dtype(0, d)?;
            (d, args[0].shape.clone())
        }
        Kernel::Binary { f } => {
            count(2)?;
            let d = args[0].dtype;
            dtype(1, d)?;
            let allowed: &[DType] = match f {
                Binary::And | Binary::Or => &[DType::Bool],
                Binary::Mod => &[DType::I64],
                Binary::Pow => &[DType::F32],
                _ => &[DType::F32, DType::I64],
            };
            ensure(allowed.contains(&d), || format!("does not take {d}"))?;
            let compares = matches!(f, Binary::Eq | Binary::Lt | Binary::Le);
            (if compares { DType::Bool } else { d }, broadcast(&args[0].shape, &args[1].shape)?)
        }
        Kernel::Select => {
            count(3)?;
            dtype(0, DType::Bool)?;
            plain(1)?;
            dtype(2, args[1].dtype)?;
            (args[1].dtype, broadcast(&args[0].shape, &broadcast(&args[1].shape, &args[2].shape)?)?)
        }
        Kernel::Cast => {
            count(1)?;
            plain(0)?;
            (out.dtype, args[0].shape.clone())
        }
        Kernel::Iota => {
            count(0)?;
            ensure(out.shape.len() == 1, || "the result must have 1 axis".into())?;
            (DType::I64, out.shape.clone())
        }
        Kernel::DimValue { .. } => {
            count(0)?;
            (DType::I64, vec![])
        }
        Kernel::Reduce { f, axes } => {
            count(1)?;
            let d = args[0].dtype;
            ensure(d == DType::F32 || (d == DType::I64 && *f != Reduce::Mean), || format!("does not take {d}"))?;
            axes.iter().try_for_each(|a| axis(0, *a))?;
            (d, args[0].shape.iter().enumerate().filter(|(i, _)| !axes.contains(i)).map(|(_, s)| s.clone()).collect())
        }
        Kernel::CumSum { axis: a } => {
            count(1)?;
            axis(0, *a)?;
            ensure(matches!(args[0].dtype, DType::F32 | DType::I64), || format!("does not take {}", args[0].dtype))?;
            (args[0].dtype, args[0].shape.clone())
        }
        Kernel::MatMul => {
            count(2)?;
            for i in 0..2 {
                dtype(i, DType::F32)?;
                rank(i, 2)?;
            }
            let ((la, a), (lb, b)) = (args[0].shape.split_at(args[0].shape.len() - 2), args[1].shape.split_at(args[1].shape.len() - 2));
            ensure(a[1] == b[0], || "inner dims differ".into())?;
            let mut s = broadcast(la, lb)?;
            s.extend([a[0].clone(), b[1].clone()]);
            (DType::F32, s)
        }
        Kernel::Transpose { perm } => {
            count(1)?;
            plain(0)?;
            let mut sorted = perm.clone();
            sorted.sort_unstable();
            ensure(sorted.into_iter().eq(0..args[0].shape.len()), || format!("{perm:?} is not a permutation of the axes"))?;
            (args[0].dtype, perm.iter().map(|p| args[0].shape[*p].clone()).collect())
        }
        Kernel::Broadcast => {
            count(1)?;
            plain(0)?;
            ensure(broadcast(&args[0].shape, &out.shape)? == out.shape, || "the operand has larger dims".into())?;
            (args[0].dtype, out.shape.clone())
        }
        Kernel::Concat { axis: a } => {
            ensure(!args.is_empty(), || "takes at least 1 operand".into())?;
            let mut s = args[0].shape.clone();
            for i in 0..args.len() {
                plain(i)?;
                dtype(i, args[0].dtype)?;
                axis(i, *a)?;
                let same = args[i].shape.len() == s.len() && args[i].shape.iter().zip(&s).enumerate().all(|(i, (x, y))| i == *a || x == y);
                ensure(same, || format!("operand {i} has the wrong shape"))?;
                if i > 0 {
                    s[*a] = &s[*a] + &args[i].shape[*a];
                }
            }
            (args[0].dtype, s)
        }
        Kernel::Slice { axis: a, .. } => {
            count(1)?;
            plain(0)?;
            axis(0, *a)?;
            let mut s = args[0].shape.clone();
            s[*a] = out.shape.get(*a).ok_or("the result has too few axes")?.clone();
            (args[0].dtype, s)
        }
        Kernel::TopK { k } => {
            count(1)?;
            dtype(0, DType::F32)?;
            rank(0, 1)?;
            let mut s = args[0].shape.clone();
            let n = s.pop().and_then(|n| n.as_const());
            ensure(n.is_some_and(|n| *k as i64 <= n), || format!("there are no {k} elements in the last axis"))?;
            s.push((*k).into());
            (DType::I64, s)
        }
        Kernel::Moe { act, dynamic } => {
            count(6)?;
            ensure(*act != Unary::Not, || "the activation must be one of floats".into())?;
            dtype(0, DType::F32)?;
            dtype(1, DType::I64)?;
            dtype(2, DType::F32)?;
            ensure(args[0].shape.len() == 2 && args[1].shape.len() == 2 && args[0].shape[0] == args[1].shape[0], || {
                "operands 0 and 1 must be matrices of as many rows".into()
            })?;
            shape(2, &args[1].shape)?;
            for i in 3..6 {
                float(i)?;
                ensure(!dynamic || quantized(i), || {
                    format!("operand {i} must be quantized if operand 0 is rounded, is {}", args[i].dtype)
                })?;
                ensure(args[i].shape.len() == 3 && matches!(args[i].place, Place::Weight(_)), || {
                    format!("operand {i} must be a weight with 3 axes")
                })?;
            }
            let (e, m, h) = (args[3].shape[0].clone(), args[3].shape[1].clone(), args[0].shape[1].clone());
            shape(3, &[e.clone(), m.clone(), h.clone()])?;
            shape(4, &args[3].shape)?;
            shape(5, &[e, h, m])?;
            (DType::F32, args[0].shape.clone())
        }
        Kernel::Gather { axis: a } => {
            count(2)?;
            plain(0)?;
            axis(0, *a)?;
            dtype(1, DType::I64)?;
            let mut s = args[0].shape.clone();
            s.splice(*a..=*a, args[1].shape.iter().cloned());
            (args[0].dtype, s)
        }
    })
}

/// Whether linear weights are in panels and all others where their kernel reads them; needs the program's weights.
pub(super) fn layouts(p: &Program) -> Check {
    for f in &p.functions {
        for (i, step) in f.steps.iter().enumerate() {
            for (operand, a) in step.args.iter().enumerate() {
                let Place::Weight(w) = get(f, *a)?.place else { continue };
                let layout = p.weights[w as usize].layout;
                let fits = match (&step.kernel, operand) {
                    (Kernel::Linear { .. } | Kernel::GatedLinear { .. }, 1) => layout != Layout::Rows,
                    (Kernel::Moe { .. }, 3..=5) => layout == Layout::Panel16,
                    (Kernel::Embedding, 0) => layout != Layout::Rows || p.weights[w as usize].dtype.scheme().is_none(),
                    _ => layout == Layout::Rows,
                };
                ensure(fits, || format!("function '{}': step {i}: operand {operand} has the wrong layout", f.name))?;
            }
        }
        for o in &f.outputs {
            let rows = !matches!(get(f, o.value)?.place, Place::Weight(w) if p.weights[w as usize].layout != Layout::Rows);
            ensure(rows, || format!("function '{}': output '{}' has the wrong layout", f.name, o.name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmc_artifact::program::{NamedValue, Weight};

    /// A function of one kernel with a weight, or why it is refused.
    fn with_weight(kernel: Kernel, [x, w, out]: [(&str, &[usize]); 3], layout: Layout) -> Check {
        with_results(kernel, [x, w], &[out], layout)
    }

    fn with_results(kernel: Kernel, [x, w]: [(&str, &[usize]); 2], outs: &[(&str, &[usize])], layout: Layout) -> Check {
        let value = |(dtype, shape): (&str, &[usize]), place| Value {
            dtype: dtype.parse().unwrap(),
            shape: shape.iter().map(|d| Dim::from(*d)).collect(),
            place,
        };
        let weight = Weight { name: "w".into(), dtype: w.0.parse().unwrap(), shape: w.1.to_vec(), layout };
        let args = if kernel == Kernel::Embedding { vec![1, 0] } else { vec![0, 1] };
        let function = Function {
            name: "f".into(),
            inputs: vec![NamedValue { name: "x".into(), value: 0 }],
            outputs: vec![NamedValue { name: "y".into(), value: 2 }],
            states: vec![],
            values: [value(x, Place::Input(0)), value(w, Place::Weight(0))]
                .into_iter()
                .chain((0..).zip(outs).map(|(i, out)| value(*out, Place::Slot(i))))
                .collect(),
            steps: vec![Step { kernel, args, outs: (2..).take(outs.len()).collect(), scope: String::new() }],
        };
        let p = Program { symbols: vec![], weights: vec![weight], functions: vec![function] };
        program(&p)?;
        layouts(&p)
    }

    #[test]
    fn packed_heads_fit_their_width() {
        let value = |width: i64| Value { dtype: DType::F32, shape: vec![3.into(), width.into()], place: Place::Slot(0) };
        let run = |[heads, kv_heads]: [usize; 2], mask, widths: &[i64]| {
            let kernel = Kernel::PackedAttention { heads, kv_heads, scale: 1.0, mask, bf16: true };
            let args: Vec<Value> = widths.iter().map(|w| value(*w)).collect();
            result(&kernel, &args.iter().collect::<Vec<_>>(), &args[0])
        };
        let heads_of_4 = |n: i64| Ok((DType::F32, vec![3.into(), (4 * n).into()]));
        assert_eq!(run([2, 2], Mask::Full, &[24]), heads_of_4(2));
        assert_eq!(run([4, 2], Mask::Full, &[32, 2, 2]), heads_of_4(4));
        for (heads, mask, widths, why) in [
            ([2, 2], Mask::Full, &[24, 2][..], "2 angles or none, got 2"),
            ([2, 2], Mask::Segments, &[24], "takes 2 operands"),
            ([2, 2], Mask::Segments, &[24, 3], "operand 3 must be i64"),
            ([2, 2], Mask::Full, &[25], "no multiple of 6 heads"),
            ([2, 2], Mask::Full, &[0], "no multiple of 6 heads"),
            ([usize::MAX, 2], Mask::Full, &[24], "no multiple of"),
            ([3, 2], Mask::Full, &[28], "heads must be a multiple of kv heads"),
            ([2, 0], Mask::Full, &[8], "heads must be a multiple of kv heads"),
            ([2, 2], Mask::Full, &[24, 3, 3], "operand 1 has the wrong shape"),
            ([2, 2], Mask::Full, &[18, 1, 1], "the width of a head is odd"),
        ] {
            let error = run(heads, mask, widths).unwrap_err();
            assert!(error.contains(why), "{heads:?} {widths:?}: {error}");
        }
    }

    #[test]
    fn quantized_weights_are_only_where_kernels_take_them() {
        let linear = |dynamic, w, layout| {
            with_weight(Kernel::Linear { dynamic, act: None }, [("f32", &[3, 40]), (w, &[20, 40]), ("f32", &[3, 20])], layout)
        };
        assert_eq!(linear(true, "int4g32", Layout::Panel16), Ok(()));
        assert_eq!(linear(false, "int8", Layout::Panel16), Ok(()));
        assert_eq!(linear(true, "int8", Layout::Planes16), Ok(()));
        assert_eq!(linear(false, "bf16", Layout::Panel16), Ok(()));
        assert!(linear(true, "bf16", Layout::Panel16).unwrap_err().contains("must be quantized"));
        assert!(linear(true, "int4g32", Layout::Rows).unwrap_err().contains("layout"));
        let embedding = |w, layout| with_weight(Kernel::Embedding, [("i64", &[3]), (w, &[20, 40]), ("f32", &[3, 40])], layout);
        assert_eq!(embedding("int8", Layout::Panel16), Ok(()));
        assert_eq!(embedding("f32", Layout::Rows), Ok(()));
        assert!(embedding("int8", Layout::Rows).unwrap_err().contains("layout"));
        // The gated product and the product itself.
        let gated = |w: &str, layout, outs: &[&[usize]]| {
            let outs: Vec<_> = outs.iter().map(|shape| ("f32", *shape)).collect();
            with_results(Kernel::GatedLinear { dynamic: true, act: Unary::Silu }, [("f32", &[3, 40]), (w, &[20, 40])], &outs, layout)
        };
        assert_eq!(gated("int8", Layout::Panel16, &[&[3, 10], &[3, 20]]), Ok(()));
        assert!(gated("int8", Layout::Panel16, &[&[3, 10]]).unwrap_err().contains("cannot have 1 results"));
        assert!(gated("int8", Layout::Panel16, &[&[3, 10], &[4, 20]]).unwrap_err().contains("gives f32[3, 20]"));
        assert!(gated("int8", Layout::Panel16, &[&[3, 20], &[3, 20]]).unwrap_err().contains("gives f32[3, 10]"));
        assert!(gated("bf16", Layout::Panel16, &[&[3, 10], &[3, 20]]).unwrap_err().contains("must be quantized"));
        assert!(gated("int8", Layout::Rows, &[&[3, 10], &[3, 20]]).is_err());
        let add = |w| with_weight(Kernel::Binary { f: Binary::Add }, [("f32", &[3, 40]), (w, &[3, 40]), ("f32", &[3, 40])], Layout::Rows);
        assert_eq!(add("f32"), Ok(()));
        assert!(add("int8").unwrap_err().contains("does not widen"));
    }
}
