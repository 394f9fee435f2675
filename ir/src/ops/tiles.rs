//! Pictures as grids of cells and of tiles.

use super::{OpDef, expect, expect_dtype, expect_rank, expect_shape, operands};
use crate::{Builder, DType, Dim, Literal, Type, Val};
use serde::{Deserialize, Serialize};
use vlmc_artifact::program::{Binary, Reduce};

/// Where the features of tiled pictures come from (DeepSeek-VL2, Wu et al., 2024, section 3.1): `crop i64[batch, pictures, 2]`,
/// the tiles of each picture across and down (0 where there is no picture), and `position i64[features]`, places in the sequence
/// of all pictures' features, to `i64[features]`, rows of a table of all tiles' cells, `batch * tiles * side²` of them, followed by
/// the newline and the separator.
///
/// A picture is its global view (one tile), the separator, and its tiles put together; a newline ends each row of cells. The tiles
/// of a row of the batch are those of its pictures one after the other, each with the global view first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TileRows {
    /// Tiles of each row of the batch.
    pub tiles: Dim,
    /// Rows and columns of cells of a tile.
    pub side: usize,
    /// Whether the global view comes before the tiles, or after them.
    pub global_first: bool,
}

impl OpDef for TileRows {
    const NAME: &'static str = "tile_rows";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [crop, position] = operands(args)?;
        expect_dtype(crop, DType::I64, "crop")?;
        expect_dtype(position, DType::I64, "position")?;
        expect(crop.rank() == 3 && crop.shape[2] == 2.into(), || format!("crop must be [batch, pictures, 2], is {crop}"))?;
        expect(position.rank() == 1, || format!("position must be [features], is {position}"))?;
        Ok(vec![position.clone()])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let [crop, position] = args.try_into().ok()?;
        let (batch, pictures) = (crop.dim(0), crop.dim(1));
        let all = &batch * &pictures;
        let int = |v: usize| g.literal(Literal::scalar(DType::I64, v as f64));
        let rem = |a: Val<'g>, b: Val<'g>| g.binary(Binary::Mod, a, b);
        let (one, side) = (int(1), int(self.side));
        let side_of = |i: usize| g.reshape(g.slice(crop, 2, i, 1), [batch.clone(), pictures.clone()]);
        let (across, down) = (side_of(0), side_of(1));
        let there = g.binary(Binary::Min, across * down, one);

        let tiles = across * down + there;
        let of_batch_row = g.unsqueeze(g.iota(batch.clone()) * g.dim(self.tiles.clone()), 1);
        let first_tile = g.cumsum(tiles, 1) - tiles + of_batch_row;
        let global_len = int(self.side * (self.side + 1));
        let local_len = down * side * (across * side + one);
        let flat = |x: Val<'g>| g.reshape(x, [all.clone()]);
        let len = flat((global_len + one + local_len) * there);
        let end = g.cumsum(len, 0);

        // The picture of a feature: how many end at or before it.
        let ended = g.binary(Binary::Le, g.unsqueeze(end, 0), g.unsqueeze(position, 1));
        let picture = g.reduce(Reduce::Sum, g.cast(ended, DType::I64), &[1]);
        let of_picture = |x: Val<'g>| g.gather(x, picture, 0);
        let at = position - of_picture(end - len);
        let (across, first_tile, local_len) = (of_picture(flat(across)), of_picture(flat(first_tile)), of_picture(flat(local_len)));
        let less = |a: Val<'g>, b: Val<'g>| g.binary(Binary::Lt, a, b);
        let (is_global, separator_at, global_at, local_at) = if self.global_first {
            (less(at, global_len), global_len, at, at - global_len - one)
        } else {
            (less(local_len, at), local_len, at - local_len - one, at)
        };

        // The global view is a picture of one tile.
        let across = g.select(is_global, one, across);
        let tile = g.select(is_global, first_tile, first_tile + one);
        let at_view = g.select(is_global, global_at, local_at);
        let columns = across * side;
        let (row, column) = (at_view / (columns + one), rem(at_view, columns + one));
        let tile = tile + row / side * across + column / side;
        let cell = (tile * side + rem(row, side)) * side + rem(column, side);
        let newline = g.dim(&(&batch * &self.tiles) * (self.side * self.side));
        let index = g.select(g.binary(Binary::Eq, column, columns), newline, cell);
        Some(vec![g.select(g.binary(Binary::Eq, at, separator_at), newline + one, index)])
    }
}

/// Attention with decomposed relative positions on a grid (Li et al., 2022, MViTv2, section 4.1; SAM) as attention without: queries
/// and keys `f32[..., side², d]` of a grid's cells, row by row, and what a query's `rows` and `columns f32[2 side - 1, d]` are to
/// keys from `side - 1` before it to as many after it, to queries and keys `f32[..., side², d + 2 side]` whose products are the
/// scores: `scale * q·k + q·rows[i] + q·columns[j]`. A query's products with the tables stand behind it, and behind a key a 1 at
/// its row and its column; so no bias of side⁴ elements is ever made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GridRelative {
    /// Rows and columns of the grid.
    pub side: usize,
    /// Multiplies the scores of queries and keys.
    pub scale: f64,
}

impl OpDef for GridRelative {
    const NAME: &'static str = "grid_relative";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [q, k, rows, columns] = operands(args)?;
        expect_dtype(q, DType::F32, "q")?;
        expect_rank(q, 2, "q")?;
        expect(q == k, || format!("q and k must be of one type, are {q} and {k}"))?;
        let (cells, d) = (Dim::from(self.side * self.side), q.last()?.clone());
        expect(self.side > 0 && q.shape[q.rank() - 2] == cells, || format!("{q} is not of {} rows and columns", self.side))?;
        for (table, what) in [(rows, "rows"), (columns, "columns")] {
            expect_dtype(table, DType::F32, what)?;
            expect_shape(table, &[Dim::from(2 * self.side - 1), d.clone()], what)?;
        }
        let mut shape = q.shape.clone();
        shape[q.rank() - 1] = &d + 2 * self.side;
        Ok(vec![Type { dtype: DType::F32, shape }; 2])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let [q, k, rows, columns] = args.try_into().ok()?;
        let (side, rank) = (Dim::from(self.side), q.ty().rank());
        let lead = q.ty().shape[..rank - 2].to_vec();
        let shaped = |last: &[Dim]| [&lead, last].concat();
        let swapped = |x: Val<'g>, a: usize, b: usize| {
            let mut perm: Vec<usize> = (0..x.ty().rank()).collect();
            perm.swap(a, b);
            g.transpose(x, &perm)
        };
        // [side of the query, d, side of the key]
        let away = g.unsqueeze(g.iota(self.side), 1) - g.unsqueeze(g.iota(self.side), 0) + (self.side as f64 - 1.0);
        let towards = |table: Val<'g>| swapped(g.gather(table, away, 0), 1, 2);
        let by_row = g.reshape(q, shaped(&[side.clone(), side.clone(), q.dim(rank - 1)]));
        let by_column = swapped(by_row, rank - 2, rank - 1);
        let cells = shaped(&[q.dim(rank - 2), side]);
        let of_rows = g.reshape(g.matmul(by_row, towards(rows)), cells.clone());
        let of_columns = g.reshape(swapped(g.matmul(by_column, towards(columns)), rank - 2, rank - 1), cells.clone());
        let one_at = |x: Val<'g>| {
            let here = g.binary(Binary::Eq, g.unsqueeze(x, 1), g.unsqueeze(g.iota(self.side), 0));
            g.broadcast(g.cast(here, DType::F32), cells.clone())
        };
        let cell = g.iota(self.side * self.side);
        let across = g.literal(Literal::scalar(DType::I64, self.side as f64));
        let k = g.concat(&[k, one_at(cell / across), one_at(g.binary(Binary::Mod, cell, across))], rank - 1);
        Some(vec![g.concat(&[q * self.scale, of_rows, of_columns], rank - 1), k])
    }
}
