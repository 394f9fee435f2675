//! The compiled program of a `cpu` artifact: per entry, a flat list of kernel calls over values placed in an arena.
//!
//! Every value is a contiguous row-major tensor, except states (see [`Place::State`]). Floating-point values are `f32`;
//! only weights have narrower types.
//!
//! The program says which results share memory, not where it lies: that follows from their sizes and lives
//! ([`Function::lives`]), which are known when the symbols are.

use crate::{DType, Dim, Symbol};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// The content of `program.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Symbols of all functions.
    pub symbols: Vec<Symbol>,
    /// Tensors of the weight file that the functions use.
    pub weights: Vec<Weight>,
    /// One per entry of the manifest, same name.
    pub functions: Vec<Function>,
}

/// A tensor of the weight file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weight {
    /// Name in the weight file.
    pub name: String,
    /// Element type in the weight file.
    pub dtype: DType,
    /// Shape that kernels see, before the layout is applied.
    pub shape: Vec<usize>,
    /// How the bytes lie.
    pub layout: Layout,
}

/// Byte order of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Row-major.
    Rows,
    /// Matrix `[n, k]` in panels of 16 rows: `[ceil(n/16), k, 16]`, missing rows zero. Element `(r, c)` is at
    /// `(r / 16, c, r % 16)`: a matrix product loads 16 outputs' weights for one `c` at once, and a panel is one
    /// sequential stream. A stack `[e, n, k]` of matrices is stored matrix by matrix.
    ///
    /// Of a quantized type: bytes `[ceil(n/16), panel_bytes]` ([`crate::quant::panel_bytes`]). A panel is a run of groups of
    /// columns; a group has the scales of its 16 rows (`f16`, or `f32` where the group is the whole row), their zero points
    /// if the scheme has them (`u8`), and blocks of codes, 4 bytes of each row: 4 columns at 8 bits; 8 columns at 4 bits, of
    /// which columns 0 to 3 are the low halves of the bytes, and 4 to 7 the high ones. At 3 bits 32 columns are a run of three blocks: the
    /// first has columns 0 to 3 in bits 0 to 2 of the bytes, 4 to 7 in bits 3 to 5, and the low two bits of 24 to 27 in bits 6 and 7; the
    /// second the same of 8 to 11, 12 to 15, and 28 to 31; the third has 16 to 19, 20 to 23, and the high bits of 24 to 27 in bit 6 and of
    /// 28 to 31 in bit 7. A last block or run that is not full ends in zero bits.
    Panel16,
    /// Quantized matrix `[n, k]` whose largest product can be found from half the bits of its codes: the upper planes of all panels,
    /// then the lower ones, `u8[ceil(n/16), panel_bytes]` together ([`crate::quant::split_planes`]).
    ///
    /// An upper plane is a panel of [`Self::Panel16`] with a block in place of two: the upper half of the bits of each code of the
    /// first, moved down, and of the second. A lower plane has the lower halves, those of the second moved up, and no scales. Groups
    /// are whole pairs of blocks.
    Planes16,
}

/// Rows per panel of [`Layout::Panel16`].
pub const PANEL: usize = 16;

/// One callable function.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Function {
    /// Entry name.
    pub name: String,
    /// Inputs in order, as indices into `values`.
    pub inputs: Vec<NamedValue>,
    /// Outputs in order, as indices into `values`.
    pub outputs: Vec<NamedValue>,
    /// State tensors, indexed by [`Place::State`].
    pub states: Vec<StateDecl>,
    /// All values.
    pub values: Vec<Value>,
    /// Kernel calls in execution order.
    pub steps: Vec<Step>,
}

impl Function {
    /// By slot, the steps from the first that writes it to the last that uses it; to the end, if an output lies there. `None` for
    /// a number that no step writes.
    pub fn lives(&self) -> Vec<Option<RangeInclusive<usize>>> {
        let slot = |value: u32| match self.values.get(value as usize)?.place {
            Place::Slot(i) => Some(i as usize).filter(|i| *i < self.values.len()),
            _ => None,
        };
        let slots = (0..self.values.len() as u32).filter_map(slot).max().map_or(0, |last| last + 1);
        let mut lives: Vec<Option<RangeInclusive<usize>>> = vec![None; slots];
        for (i, step) in self.steps.iter().enumerate() {
            for s in step.args.iter().filter_map(|a| slot(*a)) {
                // A slot that is read before it is written has no life, and the program is not valid.
                lives[s] = lives[s].take().map(|life| *life.start()..=i);
            }
            for s in step.outs.iter().filter_map(|o| slot(*o)) {
                lives[s] = Some(lives[s].take().map_or(i, |life| *life.start())..=i);
            }
        }
        for s in self.outputs.iter().filter_map(|o| slot(o.value)) {
            lives[s] = lives[s].take().map(|life| *life.start()..=self.steps.len());
        }
        lives
    }
}

/// A name for a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedValue {
    /// Port name.
    pub name: String,
    /// Index into [`Function::values`].
    pub value: u32,
}

/// A growing state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateDecl {
    /// Same as the manifest's `past` name.
    pub name: String,
    /// Shape before the call: `[batch, heads, past, head_dim]`.
    pub shape: Vec<Dim>,
    /// Axis that grows.
    pub axis: usize,
    /// How rows are kept: `f32`; `bf16`; or `i8`, each row rounded to -127..=127 with an `f32` scale max|row| / 127 of its own, as
    /// [`Kernel::Linear`] rounds.
    #[serde(default = "StateDecl::f32", skip_serializing_if = "StateDecl::is_f32")]
    pub dtype: DType,
}

impl StateDecl {
    fn f32() -> DType {
        DType::F32
    }

    fn is_f32(dtype: &DType) -> bool {
        *dtype == DType::F32
    }
}

/// A tensor of a function.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Value {
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<Dim>,
    /// Where it lies.
    pub place: Place,
}

/// Where a value lies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Caller's buffer of input `i`.
    Input(u32),
    /// Start of slot `i` of the arena. Values share a slot where one is a reshape of the other, or the result of a kernel that
    /// works in place.
    Slot(u32),
    /// Index into [`Program::weights`].
    Weight(u32),
    /// Elements, row-major; integers and booleans as numbers.
    Literal(Vec<f64>),
    /// State `i`, after this call's rows were appended: rows lie with the stride of the state's capacity, so only
    /// [`Kernel::Append`] and [`Kernel::RotaryAttention`] may write and only attention read it.
    State(u32),
}

/// A kernel call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// What to compute.
    #[serde(flatten)]
    pub kernel: Kernel,
    /// Operands: indices into [`Function::values`].
    pub args: Vec<u32>,
    /// Results.
    pub outs: Vec<u32>,
    /// Where in the model the call comes from, e.g. `blocks.0.attn`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scope: String,
}

/// Kernels. Shapes: `...` stands for any number of leading axes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kernel", rename_all = "snake_case")]
pub enum Kernel {
    /// `x f32[..., k]`, `w [n, k]` (panel16; f32, f16, bf16 or quantized), optional `bias f32[n]` -> `f32[..., n]` =
    /// act(x wᵀ + bias).
    Linear {
        /// `w` is quantized, and so is `x` first: to -127..=127 in the groups of columns of `w`, each row and group with the
        /// scale max|x| / 127: the nearest integer to x * (127 / max|x|), of two the even one.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dynamic: bool,
        /// Function of each element of the result, if there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        act: Option<Unary>,
    },
    /// Operands as [`Self::Linear`], with a `w [2 n, k]` -> `f32[..., n]`: what [`Self::Gated`] makes of the product, and the product
    /// `f32[..., 2 n]`.
    GatedLinear {
        /// As [`Self::Linear`] has it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dynamic: bool,
        /// Function of the first half.
        act: Unary,
    },
    /// `x f32[..., 2 n]` -> `f32[..., n]`: `act(a) * b` of the halves of the last axis.
    Gated {
        /// Function of the first half.
        act: Unary,
    },
    /// `table [n, h]` (rows or panel16; panel16 if quantized), `ids i64[...]` -> `f32[..., h]`. An id outside `0..n` is an error.
    Embedding,
    /// `x f32[..., n]`, `weight f32[n]`, `bias f32[n]` -> `(x - mean) / sqrt(var + eps) * weight + bias`, biased variance.
    LayerNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// `x f32[..., n]`, `weight f32[n]` -> `x / sqrt(mean(x²) + eps) * weight`.
    RmsNorm {
        /// Added to the mean square.
        eps: f64,
    },
    /// `x`, `y f32[..., n]` and the vectors of [`Kernel::LayerNorm`] -> `x + y` and its norm, in two slots.
    AddLayerNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// `x`, `y f32[..., n]` and the vector of [`Kernel::RmsNorm`] -> `x + y` and its norm, in two slots.
    AddRmsNorm {
        /// Added to the mean square.
        eps: f64,
    },
    /// `x f32[..., heads, s, d]`, `cos`, `sin f32[..., s, d/2]` -> rotation of the pairs `(i, i + d/2)`.
    Rotary,
    /// Scaled dot-product attention with grouped heads: `q f32[..., heads, s, d]`, `k f32[..., kv_heads, t, d]`,
    /// `v f32[..., kv_heads, t, dv]` (`k`, `v` may be states), mask operand as [`Mask`] says -> `f32[..., heads, s, dv]`.
    /// A query that sees no key gives zeros.
    Attention {
        /// Multiplies the scores.
        scale: f64,
        /// Which keys a query sees.
        mask: Mask,
        /// Operands of both products (weights before they are divided by their sum) may be rounded to bf16, or unless the mask is causal
        /// to 8 bits: queries and keys with a scale for each row, values for each column, weights to parts of the largest one.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        bf16: bool,
    },
    /// `new f32[batch, heads, s, d]` -> appended to the state that is the result, along its axis, in the state's type.
    Append,
    /// `q f32[batch, heads, s, d]`, `k f32[batch, kv_heads, s, d]`, `v f32[batch, kv_heads, s, dv]`, `cos`, `sin
    /// f32[batch, s, d/2]`, mask operand as [`Mask`] says -> attention of the rotated `q` to the states that are the second and
    /// the third result, after the rotated `k` and `v` were appended to them.
    RotaryAttention {
        /// Multiplies the scores.
        scale: f64,
        /// Which keys a query sees.
        mask: Mask,
        /// Operands of both products (weights before they are divided by their sum) may be rounded to bf16, or unless the mask is causal
        /// to 8 bits: queries and keys with a scale for each row, values for each column, weights to parts of the largest one.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        bf16: bool,
    },
    /// `qkv f32[..., s, (heads + 2 kv_heads) * d]` of queries, keys and values side by side, `cos` and `sin f32[..., s, d/2]` that
    /// rotate queries and keys or neither, mask operand as [`Mask`] says -> attention of the queries `f32[..., s, heads * d]`.
    PackedAttention {
        /// Heads of queries.
        heads: usize,
        /// Heads of keys and values.
        kv_heads: usize,
        /// Multiplies the scores.
        scale: f64,
        /// Which keys a query sees.
        mask: Mask,
        /// Operands of both products (weights before they are divided by their sum) may be rounded to bf16, or unless the mask is causal
        /// to 8 bits: queries and keys with a scale for each row, values for each column, weights to parts of the largest one.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        bf16: bool,
    },
    /// Elementwise function of one operand, may work in place.
    Unary {
        /// The function.
        f: Unary,
    },
    /// Elementwise function of two operands of one dtype with NumPy broadcasting; may work in place on an operand of the
    /// output's shape. Comparisons give `bool`.
    Binary {
        /// The function.
        f: Binary,
    },
    /// `condition bool`, `a`, `b` (broadcast) -> `a` where the condition holds, else `b`.
    Select,
    /// Conversion to the output's dtype; float to integer truncates towards zero.
    Cast,
    /// No operand -> `i64[n]` = 0, 1, ... n-1.
    Iota,
    /// No operand -> `i64[]`: the value of the dim.
    DimValue {
        /// The dim.
        dim: Dim,
    },
    /// Reduction over `axes` (removed from the shape).
    Reduce {
        /// The function.
        f: Reduce,
        /// Sorted axes.
        axes: Vec<usize>,
    },
    /// Running sum along `axis`, including the element itself.
    CumSum {
        /// The axis.
        axis: usize,
    },
    /// `a f32[..., m, k]`, `b f32[..., k, n]` (leading axes broadcast) -> `f32[..., m, n]`.
    MatMul,
    /// Axis `i` of the output is axis `perm[i]` of the operand.
    Transpose {
        /// The permutation.
        perm: Vec<usize>,
    },
    /// NumPy broadcast to the output's shape.
    Broadcast,
    /// Operands joined along `axis`.
    Concat {
        /// The axis.
        axis: usize,
    },
    /// Elements `start .. start + out.shape[axis]` along `axis`.
    Slice {
        /// The axis.
        axis: usize,
        /// First element.
        start: Dim,
    },
    /// `data`, `index i64[...]` -> `data` with `axis` replaced by the index's axes. An index outside the axis is an error.
    Gather {
        /// The axis.
        axis: usize,
    },
    /// `x f32[..., n]` -> `i64[..., k]`: indices of the largest elements, largest first, of equals the first first.
    TopK {
        /// How many.
        k: usize,
    },
    /// `x f32[n, h]`, `experts i64[n, k]`, `weights f32[n, k]`, `gate`, `up [e, m, h]`, `down [e, h, m]` (stacks in panel16;
    /// f32, f16, bf16 or quantized) -> `f32[n, h]`: the sum over the chosen experts of `weight * down(act(gate x) * up x)`. An expert
    /// outside `0..e` is an error.
    Moe {
        /// Activation of the gate.
        act: Unary,
        /// The stacks are quantized, and so is first what each of them multiplies, as [`Kernel::Linear`] says.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dynamic: bool,
    },
}

/// Which keys a query of [`Kernel::Attention`] sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// All keys; no mask operand.
    Full,
    /// Query `i` of `s` sees keys `j <= t - s + i` whose `attention_mask i64[batch, t]` (the mask operand) is not 0.
    Causal,
    /// Query `i` sees the keys of its own segment: the mask operand is `i64[t]` with `t = s`, a segment id per row.
    Segments,
    /// The mask operand, `bool` or `f32`, broadcast to the scores: what a query sees, or what is added to the scores.
    Given,
}

/// Functions of one operand; f32 unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Unary {
    Neg,
    Abs,
    Exp,
    Log,
    Sqrt,
    Sin,
    Cos,
    Tanh,
    Erf,
    Sigmoid,
    Floor,
    /// To the nearest integer, of two the even one.
    Round,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// `x/2 (1 + erf(x / sqrt 2))`.
    Gelu,
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))`.
    GeluTanh,
    /// bool.
    Not,
}

/// Functions of two operands; f32 and i64 unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    /// f32: division; i64: floor division (an error when the divisor is 0).
    Div,
    /// i64: remainder of the floor division.
    Mod,
    /// f32.
    Pow,
    Min,
    Max,
    Eq,
    Lt,
    Le,
    /// bool.
    And,
    /// bool.
    Or,
}

/// Reductions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Reduce {
    Sum,
    Mean,
    Max,
}
