//! One step: operands and result looked up, the kernel called.

use super::memory::{Frame, State, View};
use smallvec::SmallVec;
use vlmc_artifact::{
    DType,
    program::{Binary, Kernel, Mask, Reduce, Step, Unary},
};
use vlmc_kernels::{
    Attention, BadIndex, Broadcast, Experts, Floats, Heads, Kernels, Moe, Norm, Panels, Rounded, Rows, Seen, Src, Strides, Table,
    attention_scratch, moe_scratch,
    moves::{self, Axes},
    packed_attention_scratch, side_by_side,
};

type Done = Result<(), String>;

/// Runs a step of a checked program: `out` is the memory of its result, `scratch` is of as many bytes as [`scratch`] says. `rounded` is
/// what the step before has made of the rows that this one multiplies, if it has, and then what this one makes of those of the next.
///
/// # Errors
/// An index is out of range, an integer division by zero, no memory.
pub(super) fn run(
    k: &Kernels,
    step: &Step,
    frame: &mut Frame<'_>,
    outs: [&mut [u64]; 2],
    scratch: &mut [u64],
    rounded: &mut Option<Rounded>,
) -> Done {
    let rows = rounded.take();
    match step.kernel {
        Kernel::Append => return append(k, frame, step.args[0], step.outs[0], None),
        Kernel::RotaryAttention { .. } => {
            append(k, frame, step.args[1], step.outs[1], Some([step.args[3], step.args[4]]))?;
            append(k, frame, step.args[2], step.outs[2], None)?;
        }
        Kernel::AddLayerNorm { .. } | Kernel::AddRmsNorm { .. } => {
            *rounded = add_norm(k, step, frame, outs)?;
            return Ok(());
        }
        Kernel::GatedLinear { dynamic, act } => return gated_linear(k, step, frame, outs, (dynamic, act), rows),
        _ => {}
    }
    let [out, _] = outs;
    compute(k, step, frame, out, scratch, rows)
}

/// Bytes of memory that a step's kernel works with on so many threads. Saturates.
pub(super) fn scratch(step: &Step, shapes: &[Vec<usize>], threads: usize) -> usize {
    let shape = |i: u32| shapes[i as usize].as_slice();
    let attention = |k: u32, v: u32| {
        let (q, k, v) = (shape(step.args[0]), shape(k), shape(v));
        let group = q[q.len() - 3].checked_div(k[k.len() - 3]).unwrap_or(0);
        attention_scratch(group, q[q.len() - 2], k[k.len() - 2], q[q.len() - 1], v[v.len() - 1]).saturating_mul(threads)
    };
    let floats = match &step.kernel {
        Kernel::Attention { .. } => attention(step.args[1], step.args[2]),
        Kernel::RotaryAttention { .. } => attention(step.outs[1], step.outs[2]),
        Kernel::PackedAttention { heads, .. } => {
            let [.., s, width] = shape(step.outs[0]) else { return 0 };
            let d = width.checked_div(*heads).unwrap_or(0);
            packed_attention_scratch(*s, *s, d, d).saturating_mul(threads)
        }
        Kernel::Moe { .. } => {
            let [x, chosen, gate] = [0, 1, 3].map(|i| shape(step.args[i]));
            moe_scratch(x[0], x[1], gate[1], chosen[1], gate[0])
        }
        _ => 0,
    };
    floats.saturating_mul(size_of::<f32>())
}

/// Appends `new`, rotated by the values `angles` (cos and sin) if there are any, to the state `out`.
fn append(k: &Kernels, frame: &mut Frame<'_>, new: u32, out: u32, angles: Option<[u32; 2]>) -> Done {
    let new = new as usize;
    let shape: [usize; 4] = frame.shapes[new].as_slice().try_into().map_err(|_| "a state needs 4 axes")?;
    let vlmc_artifact::program::Place::State(i) = frame.function.values[out as usize].place else { return Err("not a state".into()) };
    let mut state = std::mem::replace(&mut frame.states[i as usize], State::new(DType::F32));
    let extend = |state: &mut State| {
        state.append(k, frame.view(new)?.f32()?, shape)?;
        if let Some([cos, sin]) = angles {
            let [cos, sin] = [cos, sin].map(|v| frame.view(v as usize).and_then(View::f32));
            state.rotate(k, cos?, sin?, shape);
        }
        Ok(())
    };
    let result = extend(&mut state);
    frame.states[i as usize] = state;
    result
}

fn add_norm(k: &Kernels, step: &Step, f: &Frame<'_>, outs: [&mut [u64]; 2]) -> Result<Option<Rounded>, String> {
    let out = step.outs[0] as usize;
    let len: usize = f.shapes[out].iter().product();
    let operand = |i: usize| f.view(step.args[i] as usize)?.f32();
    let terms = [0, 1].map(|i| if f.same_slot(step.args[i] as usize, out) { Ok(Src::InPlace) } else { operand(i).map(Src::Slice) });
    let [x, y] = terms;
    let (eps, bias) = match step.kernel {
        Kernel::AddLayerNorm { eps } => (eps, Some(operand(3)?)),
        Kernel::AddRmsNorm { eps } => (eps, None),
        _ => return Err("not a sum and its norm".into()),
    };
    let [sum, normed] = outs.map(|b| &mut bytemuck::cast_slice_mut::<u64, f32>(b)[..len]);
    let next = f.multiplied.map(|w| panels(f, w)).transpose()?;
    let norm = Norm { weight: operand(2)?, bias, eps: eps as f32 };
    Ok(k.add_norm([x?, y?], norm, sum, normed, next.as_ref()))
}

fn gated_linear(
    k: &Kernels,
    step: &Step,
    f: &Frame<'_>,
    outs: [&mut [u64]; 2],
    (dynamic, act): (bool, Unary),
    rounded: Option<Rounded>,
) -> Done {
    let [out, product] = [0, 1].map(|i| f.shapes[step.outs[i] as usize].iter().product::<usize>());
    let bias = step.args.get(2).map(|bias| f.view(*bias as usize)?.f32()).transpose()?;
    let x = rows(f, step, rounded)?;
    let [gated, whole] = outs.map(bytemuck::cast_slice_mut::<u64, f32>);
    k.gated_linear(x, &panels(f, step.args[1])?, bias, act, dynamic, [&mut whole[..product], &mut gated[..out]]);
    Ok(())
}

/// The rows that a product multiplies.
fn rows<'a>(f: &'a Frame<'_>, product: &Step, rounded: Option<Rounded>) -> Result<Rows<'a>, String> {
    match rounded {
        Some(rounded) => Ok(Rows::Rounded(rounded)),
        None => f.view(product.args[0] as usize)?.f32().map(Rows::Floats),
    }
}

/// A matrix of weights.
fn panels<'a>(f: &'a Frame<'_>, weight: u32) -> Result<Panels<'a>, String> {
    let weight = weight as usize;
    let [n, k] = [f.shapes[weight][0], f.shapes[weight][1]];
    let View::Floats(data) = f.view(weight)? else { return Err("weights must be floats".into()) };
    Panels::in_layout(data, f.layout(weight), n, k).ok_or_else(|| "a weight has the wrong length".into())
}

fn bad_index(e: BadIndex) -> String {
    format!("index {} is out of range, there are {}", e.index, e.len)
}

/// `[before, axis, after]` of a shape.
fn around(shape: &[usize], axis: usize) -> [usize; 3] {
    [shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product()]
}

/// Strides of a mask that is broadcast to `[lead, heads, s, t]`.
fn mask_strides(shape: &[usize]) -> Strides {
    let mut strides = [0; 4];
    let mut stride = 1;
    for (s, d) in strides.iter_mut().rev().zip(shape.iter().rev()) {
        if *d != 1 {
            *s = stride;
        }
        stride *= d;
    }
    strides
}

fn compute(k: &Kernels, step: &Step, f: &Frame<'_>, buffer: &mut [u64], scratch: &mut [u64], rounded: Option<Rounded>) -> Done {
    let out = step.outs[0] as usize;
    let shape = f.shapes[out].as_slice();
    let len: usize = shape.iter().product();
    let arg = |i: usize| step.args[i] as usize;
    let arg_shape = |i: usize| f.shapes[arg(i)].as_slice();
    let f32s = |i: usize| f.view(arg(i))?.f32();
    let i64s = |i: usize| f.view(arg(i))?.i64();
    let bools = |i: usize| f.view(arg(i))?.bool();
    let src = |i: usize| Ok::<_, String>(if f.same_slot(arg(i), out) { Src::InPlace } else { Src::Slice(f32s(i)?) });
    macro_rules! out {
        ($t:ty) => {
            &mut bytemuck::cast_slice_mut::<u64, $t>(buffer)[..len]
        };
    }
    /// Runs `$body` with `$get` a getter of operands' elements and `$o` the result, of the result's type.
    macro_rules! any {
        ($get:ident, $o:ident => $body:expr) => {
            match f.dtype(out) {
                DType::I64 => {
                    let ($get, $o) = (&i64s, out!(i64));
                    $body
                }
                DType::Bool => {
                    let ($get, $o) = (&bools, out!(u8));
                    $body
                }
                _ => {
                    let ($get, $o) = (&f32s, out!(f32));
                    $body
                }
            }
        };
    }
    let seen = |mask: &Mask, at: usize| {
        Ok::<_, String>(match mask {
            Mask::Full => Seen::All,
            Mask::Causal => Seen::Causal(i64s(at)?),
            Mask::Segments => Seen::Segments(i64s(at)?),
            Mask::Given => {
                let strides = mask_strides(arg_shape(at));
                match f.view(arg(at))? {
                    View::Bool(mask) => Seen::Given(mask, strides),
                    _ => Seen::Biased(f32s(at)?, strides),
                }
            }
        })
    };
    match &step.kernel {
        Kernel::Linear { act, dynamic } => {
            let panels = panels(f, step.args[1])?;
            let bias = (step.args.len() > 2).then(|| f32s(2)).transpose()?;
            if f.only_largest && f.is_output(out) && len == arg_shape(1)[0] && *dynamic && act.is_none() {
                k.linear_largest(f32s(0)?, &panels, bias, out!(f32));
            } else {
                k.linear(rows(f, step, rounded)?, &panels, bias, *act, *dynamic, out!(f32));
            }
        }
        Kernel::Gated { act } => k.gated(*act, f32s(0)?, shape.last().copied().unwrap_or(1), out!(f32)),
        Kernel::Embedding => {
            let [n, width] = [arg_shape(0)[0], arg_shape(0)[1]];
            let View::Floats(data) = f.view(arg(0))? else { return Err("weights must be floats".into()) };
            let table = Table::new(data, f.layout(arg(0)), n, width).ok_or("a weight has the wrong length")?;
            k.embedding(&table, i64s(1)?, out!(f32)).map_err(|e| format!("token id {} is not in the vocabulary of {}", e.index, e.len))?;
        }
        Kernel::LayerNorm { eps } => k.layer_norm(src(0)?, f32s(1)?, f32s(2)?, *eps as f32, out!(f32)),
        Kernel::RmsNorm { eps } => k.rms_norm(src(0)?, f32s(1)?, *eps as f32, out!(f32)),
        Kernel::Rotary => {
            let (lead, last) = shape.split_at(shape.len() - 3);
            k.rotary(f32s(0)?, f32s(1)?, f32s(2)?, [lead.iter().product(), last[0], last[1], last[2]], out!(f32));
        }
        Kernel::Attention { scale, mask, bf16 } | Kernel::RotaryAttention { scale, mask, bf16 } => {
            let (lead, last) = shape.split_at(shape.len() - 3);
            // Where keys and values are, which operand is the mask, and the angles.
            let (stored, mask_at, rotary) = match step.outs[..] {
                [_, keys, values] => ([keys as usize, values as usize], 5, Some([f32s(3)?, f32s(4)?])),
                _ => ([arg(1), arg(2)], 3, None),
            };
            let keys = f.shapes[stored[0]].as_slice();
            let a = Attention {
                q: Heads::new(f32s(0)?, last[0], last[1]),
                k: f.keys(stored[0])?,
                v: f.keys(stored[1])?,
                lead: lead.iter().product(),
                heads: last[0],
                kv_heads: keys[keys.len() - 3],
                s: last[1],
                t: keys[keys.len() - 2],
                d: f.shapes[arg(0)][shape.len() - 1],
                dv: last[2],
                scale: *scale as f32,
                seen: seen(mask, mask_at)?,
                rotary,
                packed: false,
                bf16: *bf16,
            };
            k.attention(&a, bytemuck::cast_slice_mut(scratch), out!(f32));
        }
        Kernel::PackedAttention { heads, kv_heads, scale, mask, bf16 } => {
            let (lead, last) = shape.split_at(shape.len() - 2);
            let [heads, kv_heads, s, d] = [*heads, *kv_heads, last[0], last[1] / heads];
            let (q, [keys, values]) = side_by_side(f32s(0)?, [heads, kv_heads, s, d]);
            // A mask, if there is one, is the last operand.
            let (mask_at, rotary) = match step.args.len() - usize::from(*mask != Mask::Full) {
                3 => (3, Some([f32s(1)?, f32s(2)?])),
                _ => (1, None),
            };
            let a = Attention {
                q,
                k: keys,
                v: values,
                lead: lead.iter().product(),
                heads,
                kv_heads,
                s,
                t: s,
                d,
                dv: d,
                scale: *scale as f32,
                seen: seen(mask, mask_at)?,
                rotary,
                packed: true,
                bf16: *bf16,
            };
            k.attention(&a, bytemuck::cast_slice_mut(scratch), out!(f32));
        }
        Kernel::TopK { k: count } => {
            let n = arg_shape(0).last().copied().unwrap_or(1);
            let rows = f32s(0)?.chunks_exact(n.max(1)).zip(out!(i64).chunks_exact_mut((*count).max(1)));
            for (row, out) in rows {
                moves::top_k(row, out);
            }
        }
        Kernel::Moe { act, dynamic } => {
            let experts = |i: usize| {
                let View::Floats(data) = f.view(arg(i))? else { return Err("weights must be floats".to_string()) };
                let [e, n, kk] = [arg_shape(i)[0], arg_shape(i)[1], arg_shape(i)[2]];
                Experts::new(data, e, n, kk).ok_or_else(|| "a weight has the wrong length".into())
            };
            let moe = Moe { gate: experts(3)?, up: experts(4)?, down: experts(5)?, act: *act, dynamic: *dynamic };
            k.moe(f32s(0)?, i64s(1)?, f32s(2)?, &moe, bytemuck::cast_slice_mut(scratch), out!(f32)).map_err(bad_index)?;
        }
        Kernel::Append | Kernel::AddLayerNorm { .. } | Kernel::AddRmsNorm { .. } | Kernel::GatedLinear { .. } => {
            return Err("not a computation of one result".into());
        }
        Kernel::Unary { f: Unary::Not } => {
            let o = out!(u8);
            if !f.same_slot(arg(0), out) {
                o.copy_from_slice(bools(0)?);
            }
            o.iter_mut().for_each(|b| *b = u8::from(*b == 0));
        }
        Kernel::Unary { f: function } => k.unary(*function, src(0)?, out!(f32)),
        Kernel::Binary { f: function } => binary(k, *function, step, f, buffer)?,
        Kernel::Select => any!(get, o => select(k, bools(0)?, get(1)?, get(2)?, [arg_shape(0), arg_shape(1), arg_shape(2)], shape, o)),
        Kernel::Cast => match (f.view(arg(0))?, f.dtype(out)) {
            (View::Floats(Floats::F32(x)), DType::I64) => map(x, out!(i64), |v| v as i64),
            (View::Floats(Floats::F32(x)), DType::Bool) => map(x, out!(u8), |v| u8::from(v != 0.0)),
            (View::Floats(Floats::F32(x)), _) => out!(f32).copy_from_slice(x),
            (View::Floats(_), _) => return Err("narrow floats are not cast".into()),
            (View::I64(x), DType::I64) => out!(i64).copy_from_slice(x),
            (View::I64(x), DType::Bool) => map(x, out!(u8), |v| u8::from(v != 0)),
            (View::I64(x), _) => map(x, out!(f32), |v| v as f32),
            (View::Bool(x), DType::I64) => map(x, out!(i64), |v| i64::from(v != 0)),
            (View::Bool(x), DType::Bool) => out!(u8).copy_from_slice(x),
            (View::Bool(x), _) => map(x, out!(f32), |v| f32::from(u8::from(v != 0))),
        },
        Kernel::Iota => out!(i64).iter_mut().enumerate().for_each(|(i, v)| *v = i as i64),
        Kernel::DimValue { dim } => out!(i64).fill(dim.eval(f.symbols).map_err(|e| e.to_string())?),
        Kernel::Reduce { f: function, axes } => {
            let x_shape = arg_shape(0);
            let reduced: SmallVec<[bool; 8]> = (0..x_shape.len()).map(|i| axes.contains(&i)).collect();
            match (f.dtype(out), function) {
                (DType::I64, Reduce::Max) => moves::reduce(i64s(0)?, x_shape, &reduced, i64::MIN, i64::max, out!(i64)),
                (DType::I64, _) => moves::reduce(i64s(0)?, x_shape, &reduced, 0, i64::wrapping_add, out!(i64)),
                (_, Reduce::Max) => moves::reduce(f32s(0)?, x_shape, &reduced, f32::NEG_INFINITY, f32::max, out!(f32)),
                (_, function) => {
                    let o = out!(f32);
                    moves::reduce(f32s(0)?, x_shape, &reduced, 0.0, |a, b| a + b, o);
                    if *function == Reduce::Mean {
                        let count: usize = axes.iter().map(|a| x_shape[*a]).product();
                        o.iter_mut().for_each(|v| *v /= count as f32);
                    }
                }
            }
        }
        Kernel::CumSum { axis } => match f.dtype(out) {
            DType::I64 => moves::cumsum(i64s(0)?, around(shape, *axis), i64::wrapping_add, out!(i64)),
            _ => moves::cumsum(f32s(0)?, around(shape, *axis), |a, b| a + b, out!(f32)),
        },
        Kernel::MatMul => {
            let (a, b) = (arg_shape(0), arg_shape(1));
            let lead = &shape[..shape.len() - 2];
            let [m, n, kk] = [shape[shape.len() - 2], shape[shape.len() - 1], a[a.len() - 1]];
            let strides =
                |s: &[usize], size: usize| moves::broadcast_strides(&s[..s.len() - 2], lead).iter().map(|x| x * size).collect::<Axes>();
            let (sa, sb) = (strides(a, m * kk), strides(b, kk * n));
            let base = |mut i: usize| {
                (0..lead.len()).rev().fold((0, 0), |(x, y), axis| {
                    let at = i % lead[axis];
                    i /= lead[axis];
                    (x + at * sa[axis], y + at * sb[axis])
                })
            };
            k.matmul(f32s(0)?, f32s(1)?, base, [m, kk, n], out!(f32));
        }
        Kernel::Transpose { perm } => {
            let from = moves::strides(arg_shape(0));
            let strides: Axes = perm.iter().map(|p| from[*p]).collect();
            any!(get, o => moves::strided_copy(k.pool(), get(0)?, &strides, shape, o));
        }
        Kernel::Broadcast => {
            let strides = moves::broadcast_strides(arg_shape(0), shape);
            any!(get, o => moves::strided_copy(k.pool(), get(0)?, &strides, shape, o));
        }
        Kernel::Concat { axis } => {
            let [outer, _, inner] = around(shape, *axis);
            any!(get, o => {
                let parts = (0..step.args.len()).map(|i| Ok((get(i)?, arg_shape(i)[*axis]))).collect::<Result<SmallVec<[_; 8]>, String>>()?;
                moves::concat(k.pool(), &parts, outer, inner, o);
            });
        }
        Kernel::Slice { axis, start } => {
            let start = start.eval(f.symbols).map_err(|e| e.to_string())?;
            let around = around(arg_shape(0), *axis);
            let start = usize::try_from(start).ok().filter(|s| s.checked_add(shape[*axis]).is_some_and(|end| end <= around[1]));
            let start = start.ok_or_else(|| format!("a slice of {} leaves an axis of {}", shape[*axis], around[1]))?;
            any!(get, o => moves::slice(k.pool(), get(0)?, around, start, shape[*axis], o));
        }
        Kernel::Gather { axis } => {
            let around = around(arg_shape(0), *axis);
            any!(get, o => moves::gather(k.pool(), get(0)?, around, i64s(1)?, o)).map_err(bad_index)?;
        }
    }
    Ok(())
}

fn map<A: Copy, B>(x: &[A], out: &mut [B], f: impl Fn(A) -> B) {
    out.iter_mut().zip(x).for_each(|(o, v)| *o = f(*v));
}

fn select<T: Copy + Send + Sync>(k: &Kernels, c: &[u8], a: &[T], b: &[T], shapes: [&[usize]; 3], shape: &[usize], out: &mut [T]) {
    let [sc, sa, sb] = shapes.map(|s| moves::broadcast_strides(s, shape));
    moves::strided_copy(k.pool(), b, &sb, shape, out);
    // The chosen elements over the others: the condition is read beside `a` by index.
    moves::overwrite_where(c, &sc, a, &sa, shape, out);
}

fn floor_div(a: i64, b: i64) -> i64 {
    let q = a.wrapping_div(b);
    if a.wrapping_rem(b) != 0 && (a < 0) != (b < 0) { q - 1 } else { q }
}

fn binary(k: &Kernels, function: Binary, step: &Step, f: &Frame<'_>, buffer: &mut [u64]) -> Done {
    let out = step.outs[0] as usize;
    let shape = f.shapes[out].as_slice();
    let len: usize = shape.iter().product();
    let (l, r) = (step.args[0] as usize, step.args[1] as usize);
    let [sl, sr] = [l, r].map(|v| moves::broadcast_strides(&f.shapes[v], shape));
    let both = Broadcast { shape, strides: [&sl, &sr] };
    macro_rules! call {
        ($get:ident, $t:ty, $f:expr) => {{
            let o = &mut bytemuck::cast_slice_mut::<u64, $t>(buffer)[..len];
            if f.same_slot(l, out) {
                k.update(shape, &sr, f.view(r)?.$get()?, o, $f)
            } else if f.same_slot(r, out) {
                k.update(shape, &sl, f.view(l)?.$get()?, o, |b, a| $f(a, b))
            } else {
                k.binary(&both, f.view(l)?.$get()?, f.view(r)?.$get()?, o, $f)
            }
        }};
    }
    macro_rules! compare {
        ($float:expr, $int:expr) => {{
            let o = &mut bytemuck::cast_slice_mut::<u64, u8>(buffer)[..len];
            if f.dtype(l) == DType::I64 {
                k.binary(&both, f.view(l)?.i64()?, f.view(r)?.i64()?, o, $int)
            } else {
                k.binary(&both, f.view(l)?.f32()?, f.view(r)?.f32()?, o, $float)
            }
        }};
    }
    let int = f.dtype(out) == DType::I64;
    if int && matches!(function, Binary::Div | Binary::Mod) {
        let zero =
            if f.same_slot(r, out) { bytemuck::cast_slice::<u64, i64>(buffer)[..len].contains(&0) } else { f.view(r)?.i64()?.contains(&0) };
        if zero {
            return Err("division by zero".into());
        }
    }
    match function {
        Binary::Add if int => call!(i64, i64, i64::wrapping_add),
        Binary::Sub if int => call!(i64, i64, i64::wrapping_sub),
        Binary::Mul if int => call!(i64, i64, i64::wrapping_mul),
        Binary::Div if int => call!(i64, i64, floor_div),
        Binary::Min if int => call!(i64, i64, i64::min),
        Binary::Max if int => call!(i64, i64, i64::max),
        Binary::Add => call!(f32, f32, |a: f32, b: f32| a + b),
        Binary::Sub => call!(f32, f32, |a: f32, b: f32| a - b),
        Binary::Mul => call!(f32, f32, |a: f32, b: f32| a * b),
        Binary::Div => call!(f32, f32, |a: f32, b: f32| a / b),
        Binary::Min => call!(f32, f32, f32::min),
        Binary::Max => call!(f32, f32, f32::max),
        Binary::Pow => call!(f32, f32, f32::powf),
        Binary::Mod => call!(i64, i64, |a: i64, b: i64| a.wrapping_sub(floor_div(a, b).wrapping_mul(b))),
        Binary::And => call!(bool, u8, |a: u8, b: u8| u8::from(a != 0 && b != 0)),
        Binary::Or => call!(bool, u8, |a: u8, b: u8| u8::from(a != 0 || b != 0)),
        Binary::Eq => compare!(|a, b| u8::from(a == b), |a, b| u8::from(a == b)),
        Binary::Lt => compare!(|a, b| u8::from(a < b), |a, b| u8::from(a < b)),
        Binary::Le => compare!(|a, b| u8::from(a <= b), |a, b| u8::from(a <= b)),
    }
    Ok(())
}
