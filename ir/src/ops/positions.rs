//! Positions of patches and tokens, and the angles that follow from them.

use super::{OpDef, expect, expect_dtype, operands};
use crate::{Builder, DType, Dim, Literal, Type, Val};
use serde::{Deserialize, Serialize};
use vlmc_artifact::program::{Binary, Reduce, Unary};

fn int<'g>(g: &'g Builder<'g>, v: usize) -> Val<'g> {
    g.literal(Literal::scalar(DType::I64, v as f64))
}

/// `grid_thw i64[images, 3]` (frames, rows and columns of patches of each picture or video) to three `i64[rows]`: the row, the
/// column and the segment (one per frame, counted over all images) of every patch. Patches come image after image, frame
/// after frame, and within a frame in blocks of `merge` x `merge` (Qwen2-VL's processor: h/m, w/m, m, m).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GridPositions {
    /// Number of patches of all images.
    pub rows: Dim,
    /// Side of a block.
    pub merge: usize,
}

impl OpDef for GridPositions {
    const NAME: &'static str = "grid_positions";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [grid] = operands(args)?;
        expect_dtype(grid, DType::I64, "grid")?;
        expect(grid.rank() == 2 && grid.shape[1] == 3.into(), || format!("grid must be i64[images, 3], is {grid}"))?;
        expect(self.merge > 0, || "merge must be at least 1".into())?;
        Ok(vec![Type::new(DType::I64, [&self.rows]); 3])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let Frames { h: _, w, before, in_image, size } = frames(g, args[0], &self.rows);
        let (segment, in_frame) = (before + in_image / size, g.binary(Binary::Mod, in_image, size));
        let (div, rem) = (|a: Val<'g>, b: Val<'g>| a / b, |a: Val<'g>, b: Val<'g>| g.binary(Binary::Mod, a, b));
        let (m, block_size) = (int(g, self.merge), int(g, self.merge * self.merge));
        let (block, inner, blocks_per_row) = (div(in_frame, block_size), rem(in_frame, block_size), div(w, m));
        let row = div(block, blocks_per_row) * m + div(inner, m);
        let col = rem(block, blocks_per_row) * m + rem(inner, m);
        Some(vec![row, col, segment])
    }
}

/// What `i64[rows]` patches know of their pictures.
struct Frames<'g> {
    /// Rows of patches.
    h: Val<'g>,
    /// Columns of patches.
    w: Val<'g>,
    /// Frames of all pictures before.
    before: Val<'g>,
    /// Index of the patch in its picture.
    in_image: Val<'g>,
    /// Patches of a frame.
    size: Val<'g>,
}

fn frames<'g>(g: &'g Builder<'g>, grid: Val<'g>, rows: &Dim) -> Frames<'g> {
    let images = grid.dim(0);
    let column = |i: usize| g.reshape(g.slice(grid, 1, i, 1), [images.clone()]);
    let (t, h, w) = (column(0), column(1), column(2));
    let before = |x: Val<'g>| g.cumsum(x, 0) - x;
    let patches = t * h * w;
    let patch = g.iota(rows.clone());
    // The image of a patch: how many images end at or before it.
    let ended = g.binary(Binary::Le, g.unsqueeze(g.cumsum(patches, 0), 0), g.unsqueeze(patch, 1));
    let image = g.reduce(Reduce::Sum, g.cast(ended, DType::I64), &[1]);
    let of_image = |x: Val<'g>| g.gather(x, image, 0);
    let (h, w) = (of_image(h), of_image(w));
    let in_image = patch - of_image(before(patches));
    Frames { h, w, before: of_image(before(t)), in_image, size: h * w }
}

/// The order of patches by window (Qwen2.5-VL): windows of `side` x `side` blocks from the top left of each frame on, smaller ones
/// at its right and lower border. `grid_thw i64[images, 3]` to `patch i64[tokens * merge²]`, which patch stands in each place,
/// `window i64[tokens * merge²]`, the window of each place, in rising order, and `place i64[tokens]`, where each block of patches has
/// gone. Blocks stay together, and within their frame. Patches and blocks are numbered as in [`GridPositions`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WindowOrder {
    /// Number of blocks of all images.
    pub tokens: Dim,
    /// Side of a block in patches.
    pub merge: usize,
    /// Side of a window in blocks.
    pub side: usize,
}

impl OpDef for WindowOrder {
    const NAME: &'static str = "window_order";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [grid] = operands(args)?;
        expect_dtype(grid, DType::I64, "grid")?;
        expect(grid.rank() == 2 && grid.shape[1] == 3.into(), || format!("grid must be i64[images, 3], is {grid}"))?;
        expect(self.merge > 0 && self.side > 0, || "merge and side must be at least 1".into())?;
        let patches = Type::new(DType::I64, [&self.tokens * (self.merge * self.merge)]);
        Ok(vec![patches.clone(), patches, Type::new(DType::I64, [&self.tokens])])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let area = self.merge * self.merge;
        let rows = &self.tokens * area;
        let Frames { h, w, in_image, size, .. } = frames(g, args[0], &rows);
        let (merge, area_of, side) = (int(g, self.merge), int(g, area), int(g, self.side));
        let rem = |a: Val<'g>, b: Val<'g>| g.binary(Binary::Mod, a, b);
        let min = |a: Val<'g>, b: Val<'g>| g.binary(Binary::Min, a, b);
        // All numbers from here on are in blocks.
        let (height, width) = (h / merge, w / merge);
        let in_frame = rem(in_image, size);
        let frame_start = g.iota(rows) - in_frame;
        let (block, inner) = (in_frame / area_of, rem(in_frame, area_of));

        // From a place in the new order to a block: whole rows of windows, whole windows, then rows of the window.
        let top = block / (side * width) * side;
        let rest = block - top * width;
        let tall = min(side, height - top);
        let left = rest / (tall * side) * side;
        let rest = rest - left * tall;
        let wide = min(side, width - left);
        let (row, col) = (top + rest / wide, left + rem(rest, wide));
        let patch = frame_start + (row * width + col) * area_of + inner;
        // A window is numbered by the blocks before it, which any integer type of a runtime holds.
        let window = frame_start / area_of + top * width + left * tall;

        // And from a block to its place.
        let (row, col) = (block / width, rem(block, width));
        let (top, left) = (row / side * side, col / side * side);
        let (tall, wide) = (min(side, height - top), min(side, width - left));
        let place = frame_start / area_of + top * width + left * tall + (row - top) * wide + (col - left);
        let firsts = g.slice(g.reshape(place, [self.tokens.clone(), area.into()]), 1, 0, 1);
        Some(vec![patch, window, g.reshape(firsts, [self.tokens.clone()])])
    }
}

/// A square table of positions stretched over each picture, corner to corner, with bilinear interpolation (Qwen3-VL):
/// `table f32[side², width]` and `grid_thw i64[images, 3]` to `f32[rows, width]`, patches in the order of [`GridPositions`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StretchedPositions {
    /// Number of patches of all images.
    pub rows: Dim,
    /// Side of a block.
    pub merge: usize,
    /// Side of the table.
    pub side: usize,
}

impl OpDef for StretchedPositions {
    const NAME: &'static str = "stretched_positions";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [table, grid] = operands(args)?;
        expect_dtype(table, DType::F32, "table")?;
        expect_dtype(grid, DType::I64, "grid")?;
        expect(grid.rank() == 2 && grid.shape[1] == 3.into(), || format!("grid must be i64[images, 3], is {grid}"))?;
        let fits = table.rank() == 2 && table.shape[0] == (self.side * self.side).into();
        expect(fits && self.side > 0 && self.merge > 0, || format!("table must be f32[{0} * {0}, width], is {table}", self.side))?;
        Ok(vec![Type::new(DType::F32, [self.rows.clone(), table.shape[1].clone()])])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let (table, grid) = (args[0], args[1]);
        let Frames { h, w, .. } = frames(g, grid, &self.rows);
        let [row, col, _] = g.grid_positions(grid, self.rows.clone(), self.merge);
        let last = int(g, self.side - 1);
        let one = g.literal(Literal::scalar(DType::F32, 1.0));
        // Two places of the table along an axis, with their weights; the second may be the border again, with weight 0.
        let taps = |at: Val<'g>, size: Val<'g>| {
            let steps = g.binary(Binary::Max, g.cast(size, DType::F32) - 1.0, one);
            let source = g.cast(at, DType::F32) * (self.side - 1) as f64 / steps;
            let floor = g.unary(Unary::Floor, source);
            let (first, t) = (g.cast(floor, DType::I64), source - floor);
            [(first, one - t), (g.binary(Binary::Min, first + int(g, 1), last), t)]
        };
        let (rows, columns) = (taps(row, h), taps(col, w));
        let side = int(g, self.side);
        let parts = rows
            .iter()
            .flat_map(|r| columns.iter().map(move |c| (r, c)))
            .map(|((row, a), (column, b))| g.gather(table, *row * side + *column, 0) * g.unsqueeze(*a * *b, 1));
        Some(vec![parts.reduce(|a, b| a + b)?])
    }
}

/// `theta^(-2i/d)` for `i < d/2`, rounded to `f32` as the reference computes it.
fn inverse_frequencies(theta: f64, d: usize) -> impl Iterator<Item = f64> {
    (0..d / 2).map(move |i| f64::from((1.0 / theta.powf((2 * i) as f64 / d as f64)) as f32))
}

/// `row i64[n]`, `col i64[n]` to `cos` and `sin f32[n, head_dim/2]` of the angles of a 2-D rotary embedding: the first half
/// from the row, the second from the column, each with the frequencies `theta^(-4i/head_dim)`
/// (transformers `VisionRotaryEmbedding` of Qwen2-VL).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rotary2d {
    /// Width of a head.
    pub head_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
}

impl OpDef for Rotary2d {
    const NAME: &'static str = "rotary_2d";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [row, col] = operands(args)?;
        expect_dtype(row, DType::I64, "row")?;
        expect(row.rank() == 1 && row == col, || format!("row and col must be two i64[n], are {row} and {col}"))?;
        expect(self.head_dim > 0 && self.head_dim.is_multiple_of(4), || format!("head_dim {} is not a multiple of 4", self.head_dim))?;
        Ok(vec![Type::new(DType::F32, [row.shape[0].clone(), (self.head_dim / 2).into()]); 2])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let frequencies = g.floats(inverse_frequencies(self.theta, self.head_dim / 2));
        let angles = |p: Val<'g>| g.unsqueeze(g.cast(p, DType::F32), 1) * frequencies;
        let angles = g.concat(&[angles(args[0]), angles(args[1])], 1);
        Some(vec![g.unary(Unary::Cos, angles), g.unary(Unary::Sin, angles)])
    }
}

/// How rotary frequencies are stretched for contexts beyond those of the training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All by a factor.
    Linear {
        /// Divides the frequencies.
        factor: f64,
    },
    /// Llama 3.1 (transformers `_compute_llama3_parameters`): wavelengths above `original / low_freq` by the factor, those below
    /// `original / high_freq` not at all, and in between smoothly.
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// Bound of the low frequencies.
        low_freq: f64,
        /// Bound of the high frequencies.
        high_freq: f64,
        /// Context of the training.
        original: f64,
    },
}

impl RopeScaling {
    fn is_none(&self) -> bool {
        *self == Self::None
    }

    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq, high_freq, original } => {
                let turns = original * frequency / (2.0 * std::f64::consts::PI);
                if turns < low_freq {
                    frequency / factor
                } else if turns > high_freq {
                    frequency
                } else {
                    let smooth = (turns - low_freq) / (high_freq - low_freq);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// Angles of a rotary embedding (Su et al., 2021): `position_ids i64[batch, seq]` to `cos` and `sin f32[batch, seq,
/// head_dim/2]` of the position times `theta^(-2i/head_dim)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Width of the part of a head that turns.
    pub head_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// Stretches the frequencies.
    #[serde(default, skip_serializing_if = "RopeScaling::is_none")]
    pub scaling: RopeScaling,
}

impl OpDef for Rope {
    const NAME: &'static str = "rope";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [p] = operands(args)?;
        expect_dtype(p, DType::I64, "position_ids")?;
        expect(p.rank() == 2, || format!("position_ids must be i64[batch, seq], is {p}"))?;
        expect(self.head_dim > 0 && self.head_dim.is_multiple_of(2), || format!("head_dim {} is odd", self.head_dim))?;
        Ok(vec![Type::new(DType::F32, [p.shape[0].clone(), p.shape[1].clone(), (self.head_dim / 2).into()]); 2])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let frequencies = g.floats(inverse_frequencies(self.theta, self.head_dim).map(|f| self.scaling.apply(f)));
        let angles = g.unsqueeze(g.cast(args[0], DType::F32), 2) * frequencies;
        Some(vec![g.unary(Unary::Cos, angles), g.unary(Unary::Sin, angles)])
    }
}

/// Angles of a rotary embedding whose base grows with the prompt (Qwen-VL's "dynamic NTK"): `position_ids i64[batch, seq]` and
/// `prompt_length i64[1]` to `cos` and `sin f32[batch, seq, head_dim/2]`. A prompt of more than `trained * 2^(n-1)` and at most
/// `trained * 2^n` tokens multiplies the base by `(2^(n+1) - 1)^(d / (d-2))`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NtkRope {
    /// Width of a head.
    pub head_dim: usize,
    /// Base of the frequencies of short prompts.
    pub theta: f64,
    /// Tokens of the training.
    pub trained: usize,
    /// How many bases there are at most: 1 for one that never grows.
    pub levels: usize,
}

impl OpDef for NtkRope {
    const NAME: &'static str = "ntk_rope";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [p, length] = operands(args)?;
        expect_dtype(p, DType::I64, "position_ids")?;
        expect_dtype(length, DType::I64, "prompt_length")?;
        expect(p.rank() == 2, || format!("position_ids must be i64[batch, seq], is {p}"))?;
        expect(length.shape == [1.into()], || format!("prompt_length must be i64[1], is {length}"))?;
        expect(self.head_dim > 2 && self.head_dim.is_multiple_of(2), || format!("head_dim {} must be even, and above 2", self.head_dim))?;
        expect((1..=32).contains(&self.levels) && self.trained > 0, || "levels must be from 1 to 32, and trained above 0".into())?;
        Ok(vec![Type::new(DType::F32, [p.shape[0].clone(), p.shape[1].clone(), (self.head_dim / 2).into()]); 2])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let (d, half) = (self.head_dim as f64, self.head_dim / 2);
        let base = |level: usize| self.theta * (2f64.powi(level as i32 + 1) - 1.0).powf(d / (d - 2.0));
        let frequencies = (0..self.levels).flat_map(|level| inverse_frequencies(base(level), self.head_dim)).collect();
        let table = g.literal(Literal { dtype: DType::F32, shape: vec![self.levels, half], data: frequencies });
        // The level is the number of lengths that the prompt exceeds.
        let limits = (0..self.levels).map(|n| self.trained as f64 * 2f64.powi(n as i32)).collect();
        let longer = g.cast(g.binary(Binary::Lt, g.literal(Literal::vector(DType::I64, limits)), args[1]), DType::I64);
        let level = g.binary(Binary::Min, g.reduce(Reduce::Sum, longer, &[0]), int(g, self.levels - 1));
        let angles = g.unsqueeze(g.cast(args[0], DType::F32), 2) * g.reshape(g.gather(table, level, 0), [half]);
        Some(vec![g.unary(Unary::Cos, angles), g.unary(Unary::Sin, angles)])
    }
}

/// `position_ids i64[batch, seq]` to `f32[batch, 1, seq, 1]`: what multiplies queries beyond the trained length (Qwen-VL's "log-n
/// attention"), the logarithm of position + 1 to the base `trained`, and never less than 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogN {
    /// Tokens of the training.
    pub trained: usize,
}

impl OpDef for LogN {
    const NAME: &'static str = "log_n";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [p] = operands(args)?;
        expect_dtype(p, DType::I64, "position_ids")?;
        expect(p.rank() == 2, || format!("position_ids must be i64[batch, seq], is {p}"))?;
        expect(self.trained > 1, || format!("trained must be above 1, is {}", self.trained))?;
        Ok(vec![Type::new(DType::F32, [p.shape[0].clone(), 1.into(), p.shape[1].clone(), 1.into()])])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let shape = self.infer(&[args[0].ty()]).ok()?.remove(0).shape;
        let log = g.unary(Unary::Log, g.cast(args[0], DType::F32) + 1.0) / (self.trained as f64).ln();
        let one = g.literal(Literal::scalar(DType::F32, 1.0));
        Some(vec![g.reshape(g.binary(Binary::Max, log, one), shape)])
    }
}

/// Multimodal rotary embedding (Qwen2-VL, section 2.1): `position_ids i64[3, batch, seq]` (temporal, height, width) to `cos`
/// and `sin f32[batch, seq, head_dim/2]`. The first `section[0]` angles follow the temporal position, the next `section[1]`
/// the height, the rest the width, with the frequencies `theta^(-2i/head_dim)`. Interleaved (Qwen3-VL), the kinds take turns:
/// angle `i` follows the height if `i mod 3` is 1 and `i < 3 section[1]`, the width if it is 2 and `i < 3 section[2]`, else the
/// temporal position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mrope {
    /// Width of a head.
    pub head_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// Angles of each kind; sums to `head_dim / 2`.
    pub section: [usize; 3],
    /// Whether the kinds take turns.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interleaved: bool,
}

impl OpDef for Mrope {
    const NAME: &'static str = "mrope";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [p] = operands(args)?;
        expect_dtype(p, DType::I64, "position_ids")?;
        expect(p.rank() == 3 && p.shape[0] == 3.into(), || format!("position_ids must be i64[3, batch, seq], is {p}"))?;
        let half = self.head_dim / 2;
        let sum = self.section.iter().fold(0usize, |n, s| n.saturating_add(*s));
        expect(sum == half && self.head_dim.is_multiple_of(2), || {
            format!("sections {:?} sum to {sum}, half of head_dim {} is needed", self.section, self.head_dim)
        })?;
        Ok(vec![Type::new(DType::F32, [p.shape[1].clone(), p.shape[2].clone(), half.into()]); 2])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let kinds = if self.interleaved {
            let kind = |i: usize| if i < 3 * self.section[i % 3] { i % 3 } else { 0 };
            (0..self.head_dim / 2).map(|i| kind(i) as f64).collect()
        } else {
            self.section.iter().enumerate().flat_map(|(kind, n)| std::iter::repeat_n(kind as f64, *n)).collect()
        };
        let kind = g.literal(Literal::vector(DType::I64, kinds));
        let positions = g.gather(g.transpose(args[0], &[1, 2, 0]), kind, 2);
        let angles = g.cast(positions, DType::F32) * g.floats(inverse_frequencies(self.theta, self.head_dim));
        Some(vec![g.unary(Unary::Cos, angles), g.unary(Unary::Sin, angles)])
    }
}
