//! Weights on their way from the checkpoint to the artifact: read, converted, laid out and written in tiles of rows, so that
//! memory holds a few tiles and never a model. Tiles are independent: any number of threads writes the same bytes.

use super::{Layout, Stored};
use crate::{Error, Result, checkpoint::Checkpoint, weights_writer::WeightsWriter};
use half::{bf16, f16, slice::HalfFloatSliceExt as _};
use rayon::prelude::*;
use std::ops::Range;
use vlmc_artifact::{
    Scheme,
    program::PANEL,
    quant::{self, Codes},
};
use vlmc_ir::{
    DType, Program,
    weights::{Recipe, WeightDef},
};
use vlmc_kernels::Isa;

/// Elements of a tile, roughly.
const TILE: usize = 1 << 20;
/// The same where codes are found, in several passes over the numbers: these stay in the cache.
const CODES_TILE: usize = 1 << 18;

/// Writes all of `stored`; `progress` is called with the elements of each tile written.
pub(crate) fn write(
    program: &Program,
    checkpoint: &Checkpoint,
    stored: &[Stored],
    file: &WeightsWriter,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let mut tiles = vec![];
    for s in stored {
        let def = program.weights.get(&s.weight).ok_or_else(|| Error::tensor(&s.weight, "is not a weight of the program"))?;
        let rows = def.shape.first().copied().unwrap_or(1);
        // A stack of matrices is written matrix by matrix.
        let unit = if def.shape.len() == 2 { PANEL } else { 1 };
        let tile = if def.dtype.scheme().is_some() { CODES_TILE } else { TILE };
        let step = (tile / row_elements(def).max(1)).max(1).next_multiple_of(unit);
        tiles.extend((0..rows).step_by(step).map(|start| (s, def, start..rows.min(start + step))));
    }
    let isa = Isa::detect();
    // In the order of the file, so that its digest can follow.
    tiles.into_iter().par_bridge().try_for_each(|(s, def, rows)| {
        let source = Rows { checkpoint, dtype: def.dtype, isa };
        match def.dtype {
            DType::Quant(scheme) => write_codes(s, def, scheme, rows.clone(), &source, file)?,
            _ => write_elements(s, def, rows.clone(), &source, file)?,
        }
        progress((rows.len() * row_elements(def)) as u64);
        Ok(())
    })
}

fn write_elements(s: &Stored, def: &WeightDef, rows: Range<usize>, source: &Rows<'_>, file: &WeightsWriter) -> Result<()> {
    let bytes = source.read(&def.recipe, rows.clone())?;
    let size = def.dtype.size();
    let row = row_elements(def) * size;
    match s.layout {
        Layout::Transposed => {
            let n = def.shape.first().copied().unwrap_or(1);
            write_transposed(&bytes, row_elements(def), n, rows.start, size, |at, run| file.write_at(&s.name, at, run))
        }
        Layout::Panels => {
            let packed = match def.shape[..] {
                [_, n, k] if n * k > 0 => bytes.chunks_exact(n * k * size).flat_map(|m| panels(m, n, size)).collect(),
                _ => panels(&bytes, rows.len(), size),
            };
            let row = if let [_, n, k] = def.shape[..] { n.next_multiple_of(PANEL) * k * size } else { row };
            file.write_at(&s.name, (rows.start * row) as u64, &packed)
        }
        Layout::Rows | Layout::Planes | Layout::Blocks(..) | Layout::Signed(_) => file.write_at(&s.name, (rows.start * row) as u64, &bytes),
    }
}

fn write_codes(s: &Stored, def: &WeightDef, scheme: Scheme, rows: Range<usize>, source: &Rows<'_>, file: &WeightsWriter) -> Result<()> {
    let k = def.shape.last().copied().unwrap_or(1);
    let codes = source.codes(&def.recipe, rows.clone(), k, scheme)?;
    let at = |bytes: &[u8]| (rows.start * (bytes.len() / rows.len().max(1))) as u64;
    if let Layout::Signed(float) = s.layout {
        let (bytes, scales) = (signed(&codes.codes, scheme), scales_as(&codes.scales, float));
        file.write_at(&format!("{}.codes", s.name), at(&bytes), &bytes)?;
        return file.write_at(&format!("{}.scales", s.name), at(&scales), &scales);
    }
    if let Layout::Blocks(float, block) = s.layout {
        let (bytes, scales, zeros) = pack_blocks(&codes, k, scheme, block);
        let scales = scales_as(&scales, float);
        file.write_at(&format!("{}.codes", s.name), at(&bytes), &bytes)?;
        file.write_at(&format!("{}.scales", s.name), at(&scales), &scales)?;
        return if scheme.zero_points { file.write_at(&format!("{}.zeros", s.name), at(&zeros), &zeros) } else { Ok(()) };
    }
    let panel = quant::panel_bytes(scheme, k).ok_or_else(|| Error::tensor(&s.weight, "is too large"))?;
    if s.layout == Layout::Planes {
        let [upper, lower] = quant::split_planes(&quant::pack_panels(&codes, k, scheme), k, scheme);
        let all = def.shape[0].div_ceil(PANEL) as u64;
        let [first, panels] = [rows.start, rows.len()].map(|rows| rows.div_ceil(PANEL) as u64);
        let [upper_bytes, lower_bytes] = [&upper, &lower].map(|plane| plane.len() as u64 / panels.max(1));
        file.write_at(&s.name, first * upper_bytes, &upper)?;
        return file.write_at(&s.name, all * upper_bytes + first * lower_bytes, &lower);
    }
    if let [_, n, _] = def.shape[..] {
        let mut packed = vec![];
        for matrix in 0..rows.len() {
            packed.extend(quant::pack_panels(&codes.rows(matrix * n..(matrix + 1) * n, k, scheme), k, scheme));
        }
        return file.write_at(&s.name, (rows.start * n.div_ceil(PANEL) * panel) as u64, &packed);
    }
    file.write_at(&s.name, (rows.start / PANEL * panel) as u64, &quant::pack_panels(&codes, k, scheme))
}

/// Scales in a float type.
fn scales_as(scales: &[f32], float: DType) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(scales)];
    bytes.as_chunks_mut().0.iter_mut().zip(scales).for_each(|(bytes, scale)| *bytes = scale.to_le_bytes());
    if float == DType::F32 { bytes } else { convert(&bytes, DType::F32, float) }
}

/// Codes less the middle one, in two's complement; of 4 bits two in a byte, low half first.
fn signed(codes: &[u8], scheme: Scheme) -> Vec<u8> {
    match scheme.bits {
        4 => codes.chunks(2).map(|pair| (pair[0] ^ 8) | pair.get(1).map_or(0, |c| (c ^ 8) << 4)).collect(),
        _ => codes.iter().map(|c| c ^ 128).collect(),
    }
}

/// Rows of codes as [`Layout::Blocks`] has them: codes, scales, and zero points if there are some.
fn pack_blocks(rows: &Codes, k: usize, scheme: Scheme, block: usize) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
    let (k, bits) = (k.max(1), usize::from(scheme.bits));
    let (n, blocks, groups) = (rows.codes.len() / k, k.div_ceil(block), scheme.groups(k));
    // One after another, by row, into rows of so many bytes; what is missing is 0.
    let pack = |values: &[u8], each: usize, bytes: usize| {
        let mut out = vec![0; n * bytes];
        for (values, out) in values.chunks_exact(each).zip(out.chunks_exact_mut(bytes)) {
            if scheme.bits == 8 {
                out[..each].copy_from_slice(values);
                continue;
            }
            let (pairs, last) = values.as_chunks::<2>();
            out.iter_mut().zip(pairs).for_each(|(out, [low, high])| *out = low | high << 4);
            last.iter().for_each(|last| out[pairs.len()] = *last);
        }
        out
    };
    // A row's only scale is repeated.
    let group = |b: usize| b / blocks * groups + if scheme.group.is_some() { b % blocks } else { 0 };
    let scales = (0..n * blocks).map(|b| rows.scales[group(b)]).collect();
    let zeros: Vec<u8> = if scheme.zero_points { (0..n * blocks).map(|b| rows.zeros[group(b)]).collect() } else { vec![] };
    (pack(&rows.codes, k, blocks * block * bits / 8), scales, pack(&zeros, blocks, (blocks * bits).div_ceil(8)))
}

/// Elements of a row of the weight.
fn row_elements(def: &WeightDef) -> usize {
    def.shape.iter().skip(1).product()
}

/// Row-major rows from `first` on, of a matrix of `n` rows, to the columns of its transpose: one run of bytes per row of that.
fn write_transposed(rows: &[u8], k: usize, n: usize, first: usize, size: usize, write: impl Fn(u64, &[u8]) -> Result<()>) -> Result<()> {
    let mut run = vec![];
    for c in 0..k {
        run.clear();
        rows.chunks_exact(k * size).for_each(|row| run.extend_from_slice(&row[c * size..(c + 1) * size]));
        write(((c * n + first) * size) as u64, &run)?;
    }
    Ok(())
}

/// Row-major `[n, k]` to panels of rows; missing rows of the last panel are zero.
fn panels(rows: &[u8], n: usize, size: usize) -> Vec<u8> {
    let k = rows.len() / size / n.max(1);
    let mut out = vec![0; n.div_ceil(PANEL) * PANEL * k * size];
    for (r, row) in rows.chunks_exact((k * size).max(1)).enumerate() {
        let panel = &mut out[r / PANEL * PANEL * k * size..];
        for (c, element) in row.chunks_exact(size).enumerate() {
            let at = (c * PANEL + r % PANEL) * size;
            panel[at..at + size].copy_from_slice(element);
        }
    }
    out
}

/// Makes rows of a weight by its recipe.
struct Rows<'a> {
    checkpoint: &'a Checkpoint,
    /// Element type asked for at this level of the recipe; at the top, the weight's.
    dtype: DType,
    /// What codes are found with.
    isa: Isa,
}

impl Rows<'_> {
    fn read(&self, recipe: &Recipe, rows: Range<usize>) -> Result<Vec<u8>> {
        let mut out = vec![];
        let from = self.append(recipe, rows, &mut out)?;
        Ok(if from == self.dtype { out } else { convert(&out, from, self.dtype) })
    }

    /// Appends the rows' bytes to `out`; returns their element type.
    fn append(&self, recipe: &Recipe, rows: Range<usize>, out: &mut Vec<u8>) -> Result<DType> {
        match recipe {
            Recipe::Source(name) => {
                let (dtype, _) = self.tensor(name)?;
                let mut tile = vec![];
                self.checkpoint.read_rows(name, rows, &mut tile)?;
                if out.is_empty() {
                    *out = tile
                } else {
                    out.extend(tile)
                }
                Ok(dtype)
            }
            Recipe::Reshape(inner, shape) => {
                // A row of the new shape is a whole number of the old one's rows, or they are the same.
                let (new, old) = (shape.first().copied().unwrap_or(1), self.rows(inner)?);
                let each = old.checked_div(new).unwrap_or(0);
                self.append(inner, rows.start * each..rows.end * each, out)
            }
            Recipe::Cast(inner, dtype) => {
                out.extend(Rows { dtype: *dtype, ..*self }.read(inner, rows)?);
                Ok(*dtype)
            }
            Recipe::Transpose(inner, k) => {
                let size = self.dtype.size();
                let source = self.read(inner, 0..*k)?;
                let n = source.len() / size / (*k).max(1);
                for (c, r) in rows.flat_map(|c| (0..*k).map(move |r| (c, r))) {
                    let at = (r * n + c) * size;
                    out.extend_from_slice(&source[at..at + size]);
                }
                Ok(self.dtype)
            }
            Recipe::Scale(inner, by) => {
                let by = Recipe::Source(by.clone());
                let by = self.floats(&by, 0..self.rows(&by)?)?;
                // Of a vector, the last axis is the first.
                let skip = if self.columns(inner)? == 1 { rows.start } else { 0 };
                let scaled =
                    self.floats(inner, rows)?.into_iter().zip(by.iter().cycle().skip(skip)).flat_map(|(x, s)| (x * s).to_le_bytes());
                out.extend(scaled);
                Ok(DType::F32)
            }
            Recipe::Interleave(parts, n) => {
                let parts = parts.iter().map(|p| self.read(p, rows.clone())).collect::<Result<Vec<_>>>()?;
                let row = parts.first().map_or(0, Vec::len) / (n * rows.len()).max(1);
                (0..n * rows.len()).for_each(|r| parts.iter().for_each(|p| out.extend_from_slice(&p[r * row..(r + 1) * row])));
                Ok(self.dtype)
            }
            Recipe::Quantize(..) | Recipe::Codes(..) => Err(Error::Backend("codes are used as numbers".into())),
            Recipe::Concat(parts) => {
                let mut start = 0;
                for part in parts {
                    let end = start + self.rows(part)?;
                    let wanted = rows.start.max(start)..rows.end.min(end);
                    if !wanted.is_empty() {
                        out.extend(self.read(part, wanted.start - start..wanted.end - start)?);
                    }
                    start = end;
                }
                Ok(self.dtype)
            }
        }
    }

    /// Numbers of rows.
    fn floats(&self, recipe: &Recipe, rows: Range<usize>) -> Result<Vec<f32>> {
        let mut bytes = vec![];
        let from = Rows { dtype: DType::F32, ..*self }.append(recipe, rows, &mut bytes)?;
        Ok(match from {
            DType::F16 => reinterpret::<2, _>(&bytes, f16::from_le_bytes).to_f32_vec(),
            DType::BF16 => reinterpret(&bytes, |b| bf16::from_le_bytes(b).to_f32()),
            _ => reinterpret(&bytes, f32::from_le_bytes),
        })
    }

    /// Codes of rows of a weight quantized by `scheme`, whose last dim is `k`.
    fn codes(&self, recipe: &Recipe, rows: Range<usize>, k: usize, scheme: Scheme) -> Result<Codes> {
        match recipe {
            Recipe::Quantize(inner, scheme, method) => {
                Ok(vlmc_kernels::quantize(self.isa, &self.floats(inner, rows)?, k, *scheme, *method))
            }
            Recipe::Codes(name, _) => {
                let part = |part: &str| {
                    let mut bytes = vec![];
                    self.checkpoint.read_rows(&format!("{name}.{part}"), rows.clone(), &mut bytes).map(|()| bytes)
                };
                Ok(Codes { codes: part("codes")?, scales: reinterpret(&part("scales")?, f32::from_le_bytes), zeros: part("zeros")? })
            }
            Recipe::Concat(parts) => {
                let (mut out, mut start) = (Codes::default(), 0);
                for part in parts {
                    let end = start + self.rows(part)?;
                    let wanted = rows.start.max(start)..rows.end.min(end);
                    if !wanted.is_empty() {
                        out.append(self.codes(part, wanted.start - start..wanted.end - start, k, scheme)?);
                    }
                    start = end;
                }
                Ok(out)
            }
            Recipe::Interleave(parts, n) => {
                let parts = parts.iter().map(|p| self.codes(p, rows.clone(), k, scheme)).collect::<Result<Vec<_>>>()?;
                let mut out = Codes::default();
                (0..n * rows.len()).for_each(|r| parts.iter().for_each(|codes| out.append(codes.rows(r..r + 1, k, scheme))));
                Ok(out)
            }
            Recipe::Reshape(inner, shape) => {
                let each = self.rows(inner)?.checked_div(shape.first().copied().unwrap_or(1)).unwrap_or(0);
                self.codes(inner, rows.start * each..rows.end * each, k, scheme)
            }
            _ => Err(Error::Backend("a quantized weight has a recipe without codes".into())),
        }
    }

    fn rows(&self, recipe: &Recipe) -> Result<usize> {
        match recipe {
            Recipe::Source(name) => Ok(self.tensor(name)?.1.first().copied().unwrap_or(1)),
            Recipe::Reshape(_, shape) => Ok(shape.first().copied().unwrap_or(1)),
            Recipe::Cast(inner, _) | Recipe::Scale(inner, _) | Recipe::Quantize(inner, ..) => self.rows(inner),
            Recipe::Codes(name, _) => Ok(self.tensor(&format!("{name}.codes"))?.1.first().copied().unwrap_or(1)),
            Recipe::Transpose(inner, _) => self.columns(inner),
            Recipe::Concat(parts) => parts.iter().map(|p| self.rows(p)).sum(),
            Recipe::Interleave(parts, _) => parts.first().map_or(Ok(0), |p| self.rows(p)),
        }
    }

    /// Elements of a row.
    fn columns(&self, recipe: &Recipe) -> Result<usize> {
        match recipe {
            Recipe::Source(name) => Ok(self.tensor(name)?.1.iter().skip(1).product()),
            Recipe::Reshape(_, shape) => Ok(shape.iter().skip(1).product()),
            Recipe::Cast(inner, _) | Recipe::Scale(inner, _) | Recipe::Quantize(inner, ..) => self.columns(inner),
            Recipe::Codes(name, _) => Ok(self.tensor(&format!("{name}.codes"))?.1.iter().skip(1).product()),
            Recipe::Transpose(_, k) => Ok(*k),
            Recipe::Concat(parts) => parts.first().map_or(Ok(0), |p| self.columns(p)),
            Recipe::Interleave(parts, _) => parts.iter().map(|p| self.columns(p)).sum(),
        }
    }

    fn tensor(&self, name: &str) -> Result<(DType, &[usize])> {
        self.checkpoint
            .tensor(name)
            .ok_or_else(|| Error::tensor(name, "is missing from the checkpoint, or of a type that is not supported"))
    }
}

fn reinterpret<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|b| f(*b)).collect()
}

/// Floats of one type to another; narrowing rounds to nearest even.
fn convert(bytes: &[u8], from: DType, to: DType) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() / from.size() * to.size());
    let mut put = |v: f32| match to {
        DType::F16 => out.extend_from_slice(&f16::from_f32(v).to_le_bytes()),
        DType::BF16 => out.extend_from_slice(&bf16::from_f32(v).to_le_bytes()),
        _ => out.extend_from_slice(&v.to_le_bytes()),
    };
    match from {
        DType::F16 => bytes.as_chunks().0.iter().for_each(|b| put(f16::from_le_bytes(*b).to_f32())),
        DType::BF16 => bytes.as_chunks().0.iter().for_each(|b| put(bf16::from_le_bytes(*b).to_f32())),
        _ => bytes.as_chunks().0.iter().for_each(|b| put(f32::from_le_bytes(*b))),
    }
    out
}
