//! Where values lie while a function runs.

use super::{
    arena::{Lives, Places, Rest},
    step,
    weights::Weights,
};
use crate::{Data, Result, Tensor, binding::extent};
use half::bf16;
use std::collections::HashMap;
use vlmc_artifact::{
    Bindings, DType, Dim,
    program::{Function, Layout, Place},
};
use vlmc_kernels::{Floats, Heads, Kept, Kernels};

/// Shapes of all values of a function, kept from run to run.
pub(super) struct Shapes {
    /// Those that differ: a function has few, and thousands of values.
    dims: Vec<Dim>,
    /// Of each value, its axes among `dims`.
    axes: Vec<Vec<usize>>,
    extents: Vec<usize>,
    shapes: Vec<Vec<usize>>,
}

impl Shapes {
    pub(super) fn new(f: &Function) -> Self {
        let mut known: HashMap<&Dim, usize> = HashMap::new();
        let mut axis = |d| {
            let next = known.len();
            *known.entry(d).or_insert(next)
        };
        let axes: Vec<Vec<usize>> = f.values.iter().map(|v| v.shape.iter().map(&mut axis).collect()).collect();
        let mut dims = vec![Dim::default(); known.len()];
        known.into_iter().for_each(|(d, i)| dims[i] = d.clone());
        Self { extents: vec![0; dims.len()], dims, shapes: axes.clone(), axes }
    }

    /// The shapes with these values of the symbols.
    pub(super) fn of(&mut self, symbols: &Bindings) -> Result<&[Vec<usize>], String> {
        for (d, to) in self.dims.iter().zip(&mut self.extents) {
            *to = extent(d, symbols)?;
        }
        for (axes, shape) in self.axes.iter().zip(&mut self.shapes) {
            axes.iter().zip(shape).for_each(|(axis, to)| *to = self.extents[*axis]);
        }
        Ok(&self.shapes)
    }
}

/// Bytes of the slots of a function, and of the scratch of each of its steps, in place of what `sizes` held.
pub(super) fn sizes(f: &Function, lives: &Lives, shapes: &[Vec<usize>], threads: usize, sizes: &mut Vec<usize>) {
    sizes.clear();
    sizes.resize(lives.slots(), 0);
    for (v, shape) in f.values.iter().zip(shapes) {
        if let Place::Slot(i) = v.place {
            let bytes = shape.iter().fold(v.dtype.size(), |n, d| n.saturating_mul(*d));
            sizes[i as usize] = bytes.max(sizes[i as usize]);
        }
    }
    sizes.extend(f.steps.iter().map(|step| step::scratch(step, shapes, threads)));
}

/// A literal's elements.
pub(super) enum Literal {
    F32(Vec<f32>),
    I64(Vec<i64>),
    Bool(Vec<u8>),
}

impl Literal {
    pub(super) fn new(dtype: DType, data: &[f64]) -> Self {
        match dtype {
            DType::I64 => Self::I64(data.iter().map(|v| *v as i64).collect()),
            DType::Bool => Self::Bool(data.iter().map(|v| u8::from(*v != 0.0)).collect()),
            _ => Self::F32(data.iter().map(|v| *v as f32).collect()),
        }
    }
}

/// Rows by which a state grows. It is copied then: that costs as much as a few steps of decoding, and memory that is never used
/// is at most this.
const GROWTH: usize = 256;

/// Bytes that a state `[batch, heads, len, width]` takes whose rows are kept in `dtype`. Saturates.
pub(crate) fn state_bytes([batch, heads, len, width]: [usize; 4], dtype: DType) -> usize {
    let capacity = len.checked_next_multiple_of(GROWTH).unwrap_or(usize::MAX);
    let scale = if dtype == DType::I8 { size_of::<f32>() } else { 0 };
    let row = width.saturating_mul(dtype.size()).saturating_add(scale);
    [heads, capacity, row].iter().fold(batch, |n, d| n.saturating_mul(*d))
}

/// A growing tensor `[batch, heads, len, width]`, each head with room for `capacity` rows.
pub(super) struct State {
    rows: Rows,
    batch: usize,
    heads: usize,
    width: usize,
    len: usize,
    capacity: usize,
}

/// Rows as a state keeps them.
enum Rows {
    F32(Vec<f32>),
    BF16(Vec<bf16>),
    /// And the scale of each row.
    I8(Vec<i8>, Vec<f32>),
}

impl State {
    /// An empty state of a type that [`vlmc_artifact::program::StateDecl`] allows.
    pub(super) fn new(dtype: DType) -> Self {
        let rows = match dtype {
            DType::BF16 => Rows::BF16(vec![]),
            DType::I8 => Rows::I8(vec![], vec![]),
            _ => Rows::F32(vec![]),
        };
        Self { rows, batch: 0, heads: 0, width: 0, len: 0, capacity: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The shape now; `None` if it is empty, when any batch may come.
    pub(super) fn shape(&self) -> Option<[usize; 4]> {
        (self.len > 0).then_some([self.batch, self.heads, self.len, self.width])
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Appends `new [batch, heads, s, width]`.
    pub(super) fn append(&mut self, k: &Kernels, new: &[f32], [batch, heads, s, width]: [usize; 4]) -> Result<(), String> {
        if self.len == 0 && (self.batch, self.heads, self.width) != (batch, heads, width) {
            (self.batch, self.heads, self.width, self.capacity) = (batch, heads, width, 0);
        }
        let len = self.len + s;
        if new.is_empty() {
            self.len = len;
            return Ok(());
        }
        if len > self.capacity {
            let capacity = len.next_multiple_of(GROWTH);
            let grow = Grow { heads: batch * heads, from: self.capacity, to: capacity, used: self.len };
            match &mut self.rows {
                Rows::F32(rows) => *rows = grow.of(rows, width)?,
                Rows::BF16(rows) => *rows = grow.of(rows, width)?,
                Rows::I8(rows, scales) => (*rows, *scales) = (grow.of(rows, width)?, grow.of(scales, 1)?),
            }
            self.capacity = capacity;
        }
        for head in 0..batch * heads {
            let new = &new[head * s * width..][..s * width];
            let first = head * self.capacity + self.len;
            let at = first * width..(first + s) * width;
            match &mut self.rows {
                Rows::F32(rows) => rows[at].copy_from_slice(new),
                Rows::BF16(rows) => rows[at].iter_mut().zip(new).for_each(|(r, v)| *r = bf16::from_f32(*v)),
                Rows::I8(rows, scales) => k.round(new, width, &mut rows[at], &mut scales[first..first + s]),
            }
        }
        self.len = len;
        Ok(())
    }

    /// Rotates the last `s` rows of `[batch, heads, s, width]`, which are kept in `f32`, by `cos` and `sin [batch, s, width/2]`.
    pub(super) fn rotate(&mut self, k: &Kernels, cos: &[f32], sin: &[f32], [_, heads, s, width]: [usize; 4]) {
        if let Rows::F32(rows) = &mut self.rows {
            k.rotate_rows(rows, self.capacity * width, self.len - s, cos, sin, [heads, s, width]);
        }
    }

    fn keys(&self) -> Heads<Kept<'_>> {
        let data = match &self.rows {
            Rows::F32(rows) => Kept::F32(rows),
            Rows::BF16(rows) => Kept::BF16(rows),
            Rows::I8(rows, scales) => Kept::I8(rows, scales),
        };
        Heads::new(data, self.heads, self.capacity)
    }
}

/// More room for each head.
struct Grow {
    heads: usize,
    /// Rows that there is room for.
    from: usize,
    /// Rows that there will be room for.
    to: usize,
    /// Rows that there are.
    used: usize,
}

impl Grow {
    /// A larger copy of `rows`, of `width` each.
    fn of<T: Copy + Default>(&self, rows: &mut Vec<T>, width: usize) -> Result<Vec<T>, String> {
        if self.used == 0 {
            // Given back first, so that both are never there at once.
            *rows = vec![];
        }
        let size = self.heads.checked_mul(self.to).and_then(|n| n.checked_mul(width)).ok_or("the cache is too large")?;
        let mut data: Vec<T> = vec![];
        data.try_reserve_exact(size).map_err(|_| format!("there is no memory for a cache of {size} numbers"))?;
        let used = self.used * width;
        for head in 0..self.heads {
            if used > 0 {
                data.extend_from_slice(&rows[head * self.from * width..][..used]);
            }
            data.resize((head + 1) * self.to * width, T::default());
        }
        Ok(data)
    }
}

/// A value's elements.
#[derive(Clone, Copy)]
pub(super) enum View<'a> {
    Floats(Floats<'a>),
    I64(&'a [i64]),
    Bool(&'a [u8]),
}

impl<'a> View<'a> {
    pub(super) fn f32(self) -> Result<&'a [f32], String> {
        if let Self::Floats(Floats::F32(v)) = self { Ok(v) } else { Err("expected f32".into()) }
    }

    pub(super) fn i64(self) -> Result<&'a [i64], String> {
        if let Self::I64(v) = self { Ok(v) } else { Err("expected i64".into()) }
    }

    pub(super) fn bool(self) -> Result<&'a [u8], String> {
        if let Self::Bool(v) = self { Ok(v) } else { Err("expected bool".into()) }
    }
}

/// All that a step can see.
pub(super) struct Frame<'a> {
    pub(super) function: &'a Function,
    pub(super) shapes: &'a [Vec<usize>],
    pub(super) symbols: &'a Bindings,
    pub(super) inputs: &'a [&'a Tensor],
    pub(super) literals: &'a [Option<Literal>],
    pub(super) weights: &'a Weights,
    pub(super) places: &'a Places,
    /// But for what the step writes.
    pub(super) arena: Rest<'a>,
    pub(super) states: &'a mut [State],
    /// Of rows of outputs only the largest number is wanted.
    pub(super) only_largest: bool,
    /// The weight that the next step multiplies what this one makes last with, if nothing else becomes of that.
    pub(super) multiplied: Option<u32>,
}

impl Frame<'_> {
    /// Number of elements of a value.
    fn len(&self, value: usize) -> usize {
        self.shapes[value].iter().product()
    }

    pub(super) fn dtype(&self, value: usize) -> DType {
        self.function.values[value].dtype
    }

    /// Elements of a value that is not a state.
    pub(super) fn view(&self, value: usize) -> Result<View<'_>, String> {
        let len = self.len(value);
        Ok(match &self.function.values[value].place {
            Place::Input(i) => match self.inputs[*i as usize].data() {
                Data::F32(v) => View::Floats(Floats::F32(v)),
                Data::I64(v) => View::I64(v),
                Data::Bool(v) => View::Bool(bytemuck::cast_slice(v)),
            },
            Place::Slot(i) => {
                let words = self.arena.get(self.places.slot(*i as usize)).ok_or("an operand is being written")?;
                match self.dtype(value) {
                    DType::I64 => View::I64(&bytemuck::cast_slice(words)[..len]),
                    DType::Bool => View::Bool(&bytemuck::cast_slice(words)[..len]),
                    _ => View::Floats(Floats::F32(&bytemuck::cast_slice(words)[..len])),
                }
            }
            Place::Weight(i) => View::Floats(self.weights.floats(*i as usize)),
            Place::Literal(_) => match self.literals[value].as_ref().ok_or("a literal is missing")? {
                Literal::F32(v) => View::Floats(Floats::F32(v)),
                Literal::I64(v) => View::I64(v),
                Literal::Bool(v) => View::Bool(v),
            },
            Place::State(_) => return Err("a state has no plain elements".into()),
        })
    }

    /// Keys or values of attention: a state, or `[..., kv_heads, t, d]`.
    pub(super) fn keys(&self, value: usize) -> Result<Heads<Kept<'_>>, String> {
        let shape = &self.shapes[value];
        if let Place::State(i) = self.function.values[value].place {
            let s = &self.states[i as usize];
            if s.shape().as_ref().map(<[usize; 4]>::as_slice) != Some(shape) && !shape.contains(&0) {
                return Err(format!("a state of shape {:?} is read as {shape:?}", s.shape()));
            }
            return Ok(s.keys());
        }
        Ok(Heads::new(Kept::F32(self.view(value)?.f32()?), shape[shape.len() - 3], shape[shape.len() - 2]))
    }

    pub(super) fn layout(&self, value: usize) -> Layout {
        match self.function.values[value].place {
            Place::Weight(i) => self.weights.layout(i as usize),
            _ => Layout::Rows,
        }
    }

    /// Whether two values lie in one slot.
    pub(super) fn same_slot(&self, a: usize, b: usize) -> bool {
        let place = |v: usize| &self.function.values[v].place;
        matches!((place(a), place(b)), (Place::Slot(x), Place::Slot(y)) if x == y)
    }

    /// Whether a value is an output, perhaps in another shape.
    pub(super) fn is_output(&self, value: usize) -> bool {
        self.function.outputs.iter().any(|o| self.same_slot(o.value as usize, value))
    }

    /// A copy of a value.
    pub(super) fn tensor(&self, value: usize) -> Result<Tensor> {
        let mut tensor = Tensor::default();
        self.copy(value, &mut tensor)?;
        Ok(tensor)
    }

    /// Makes `to` a copy of a value, in the memory that it has where that can be.
    pub(super) fn copy(&self, value: usize, to: &mut Tensor) -> Result<()> {
        let (invalid, shape) = (crate::Error::Input, &self.shapes[value]);
        match self.view(value).map_err(invalid)? {
            View::Floats(Floats::F32(v)) => to.fill(shape, v.iter().copied()),
            View::Floats(_) => Err(invalid("an output is of narrow floats".into())),
            View::I64(v) => to.fill(shape, v.iter().copied()),
            View::Bool(v) => to.fill(shape, v.iter().map(|b| *b != 0)),
        }
    }
}
