//! Where values lie while a function runs.

use super::{
    arena::{Lives, Places, Rest},
    step,
    weights::Weights,
};
use crate::{Data, Result, Tensor, binding::extents};
use vlmc_artifact::{
    Bindings, DType,
    program::{Function, Layout, Place},
};
use vlmc_kernels::{Floats, Kernels, Keys};

/// Shapes of all values.
pub(super) fn shapes(f: &Function, symbols: &Bindings) -> Result<Vec<Vec<usize>>, String> {
    f.values.iter().map(|v| extents(&v.shape, symbols)).collect()
}

/// Bytes of the slots of a function, and of the scratch of each of its steps.
pub(super) fn sizes(f: &Function, lives: &Lives, shapes: &[Vec<usize>], threads: usize) -> Vec<usize> {
    let mut sizes = vec![0; lives.slots()];
    for (v, shape) in f.values.iter().zip(shapes) {
        if let Place::Slot(i) = v.place {
            let bytes = shape.iter().fold(v.dtype.size(), |n, d| n.saturating_mul(*d));
            sizes[i as usize] = bytes.max(sizes[i as usize]);
        }
    }
    sizes.extend(f.steps.iter().map(|step| step::scratch(step, shapes, threads)));
    sizes
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

/// Bytes that a state `[batch, heads, len, width]` takes. Saturates.
pub(crate) fn state_bytes([batch, heads, len, width]: [usize; 4]) -> usize {
    let capacity = len.checked_next_multiple_of(GROWTH).unwrap_or(usize::MAX);
    [heads, capacity, width, size_of::<f32>()].iter().fold(batch, |n, d| n.saturating_mul(*d))
}

/// A growing tensor `[batch, heads, len, width]`, each head with room for `capacity` rows.
#[derive(Default)]
pub(super) struct State {
    data: Vec<f32>,
    batch: usize,
    heads: usize,
    width: usize,
    len: usize,
    capacity: usize,
}

impl State {
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

    /// Appends `rows [batch, heads, s, width]`.
    pub(super) fn append(&mut self, rows: &[f32], [batch, heads, s, width]: [usize; 4]) -> Result<(), String> {
        if self.len == 0 && (self.batch, self.heads, self.width) != (batch, heads, width) {
            *self = Self { batch, heads, width, ..Self::default() };
        }
        let len = self.len + s;
        if rows.is_empty() {
            self.len = len;
            return Ok(());
        }
        if len > self.capacity {
            let bytes = state_bytes([batch, heads, len, width]);
            if self.len == 0 {
                self.data = vec![];
            }
            let mut data: Vec<f32> = vec![];
            data.try_reserve_exact(bytes / size_of::<f32>()).map_err(|_| format!("there is no memory for a cache of {bytes} bytes"))?;
            let capacity = len.next_multiple_of(GROWTH);
            let kept = self.len * width;
            for head in 0..batch * heads {
                if kept > 0 {
                    data.extend_from_slice(&self.data[head * self.capacity * width..][..kept]);
                }
                data.resize((head + 1) * capacity * width, 0.0);
            }
            (self.data, self.capacity) = (data, capacity);
        }
        let new = s * width;
        for head in 0..batch * heads {
            self.data[(head * self.capacity + self.len) * width..][..new].copy_from_slice(&rows[head * new..][..new]);
        }
        self.len = len;
        Ok(())
    }

    /// Rotates the last `s` rows of `[batch, heads, s, width]` by `cos` and `sin [batch, s, width/2]`.
    pub(super) fn rotate(&mut self, k: &Kernels, cos: &[f32], sin: &[f32], [_, heads, s, width]: [usize; 4]) {
        k.rotate_rows(&mut self.data, self.capacity * width, self.len - s, cos, sin, [heads, s, width]);
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
    pub(super) fn keys(&self, value: usize) -> Result<Keys<'_>, String> {
        let shape = &self.shapes[value];
        if let Place::State(i) = self.function.values[value].place {
            let s = &self.states[i as usize];
            if s.shape().as_ref().map(<[usize; 4]>::as_slice) != Some(shape) && !shape.contains(&0) {
                return Err(format!("a state of shape {:?} is read as {shape:?}", s.shape()));
            }
            return Ok(Keys { data: &s.data, head_stride: s.capacity * s.width });
        }
        let head_stride = shape[shape.len() - 2] * shape[shape.len() - 1];
        Ok(Keys { data: self.view(value)?.f32()?, head_stride })
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

    /// A copy of a value.
    pub(super) fn tensor(&self, value: usize) -> Result<Tensor> {
        let invalid = crate::Error::Input;
        let data: Data = match self.view(value).map_err(invalid)? {
            View::Floats(Floats::F32(v)) => v.to_vec().into(),
            View::Floats(_) => return Err(invalid("an output is of narrow floats".into())),
            View::I64(v) => v.to_vec().into(),
            View::Bool(v) => v.iter().map(|b| *b != 0).collect::<Vec<_>>().into(),
        };
        Tensor::new(self.shapes[value].clone(), data)
    }
}
