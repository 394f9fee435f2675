//! Where a tensor lies in a file, and how its rows are read from there.

use safetensors::Dtype;
use std::{fs::File, io, iter, ops::Range, os::unix::fs::FileExt};

/// Longest tensor name: more than any model has, and short enough for error messages.
const MAX_NAME: usize = 1024;
/// A row that is spread over this many times its own bytes is still read in one piece.
const MAX_SPREAD: u64 = 8;

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Bytes of the file from the first element to the last.
    pub(crate) range: Range<u64>,
    /// Elements between neighbours along each axis; `None` if they are in row-major order, as always in safetensors.
    pub(crate) strides: Option<Vec<u64>>,
}

impl Stored {
    /// Replaces `buf` with the bytes of some indices of the first axis, in row-major order. A scalar is one row.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn read_rows(&self, file: &File, rows: Range<usize>, buf: &mut Vec<u8>) -> io::Result<()> {
        let count = self.shape.first().copied().unwrap_or(1);
        let Some(strides) = &self.strides else {
            // Whole bytes for every type but the packed 4- and 6-bit ones, which `Checkpoint::resolve` refuses.
            let row = (self.range.end - self.range.start).checked_div(count as u64).unwrap_or(0);
            buf.resize(rows.len() * row as usize, 0);
            return file.read_exact_at(buf, self.range.start + rows.start as u64 * row);
        };
        let (Some((_, shape)), Some((row_stride, strides))) = (self.shape.split_first(), strides.split_first()) else { return Ok(()) };
        let size = self.dtype.bitsize() / 8;
        let columns: usize = shape.iter().product();
        let at = |row: usize| self.range.start + row as u64 * row_stride * size as u64;
        buf.resize(rows.len() * columns * size, 0);
        if rows_are_compact(shape, strides) {
            let mut block = vec![0; span(shape, strides) as usize * size];
            for (row, out) in rows.zip(buf.chunks_exact_mut(columns * size)) {
                file.read_exact_at(&mut block, at(row))?;
                for (out, offset) in out.chunks_exact_mut(size).zip(offsets(shape, strides)) {
                    let from = offset as usize * size;
                    out.copy_from_slice(&block[from..from + size]);
                }
            }
        } else {
            // Columns are contiguous, or `readable` had refused it.
            let mut column = vec![0; rows.len() * size];
            for (i, offset) in offsets(shape, strides).enumerate() {
                file.read_exact_at(&mut column, at(rows.start) + offset * size as u64)?;
                for (out, element) in buf.chunks_exact_mut(columns * size).zip(column.chunks_exact(size)) {
                    out[i * size..][..size].copy_from_slice(element);
                }
            }
        }
        Ok(())
    }
}

/// True if [`Stored::read_rows`] can read such strides in pieces that are not tiny: the elements of a row are close to one
/// another (slices, channels-last), or the rows are (transposed). There must be as many strides as axes, and no axis of length 0.
pub(crate) fn readable(shape: &[usize], strides: &[u64]) -> bool {
    match (shape.split_first(), strides.split_first()) {
        (Some((_, inner)), Some((row, strides))) => *row == 1 || rows_are_compact(inner, strides),
        _ => true,
    }
}

/// # Errors
/// A tensor's name is too long, or would garble a terminal.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    if name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let start: String = name.chars().take(40).collect();
        return Err(format!("tensor name {start:?}… is too long or has control characters"));
    }
    Ok(())
}

fn rows_are_compact(shape: &[usize], strides: &[u64]) -> bool {
    span(shape, strides) <= (shape.iter().product::<usize>() as u64).saturating_mul(MAX_SPREAD)
}

/// Elements from the first to the last of a row.
fn span(shape: &[usize], strides: &[u64]) -> u64 {
    1 + iter::zip(shape, strides).map(|(n, stride)| (*n as u64 - 1) * stride).sum::<u64>()
}

/// Where the elements of a row lie, in row-major order.
fn offsets(shape: &[usize], strides: &[u64]) -> impl Iterator<Item = u64> {
    let mut index = vec![0; shape.len()];
    let mut next = Some(0);
    iter::from_fn(move || {
        let this = next?;
        let mut offset = this;
        next = None;
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            offset += strides[axis];
            if index[axis] < shape[axis] {
                next = Some(offset);
                break;
            }
            offset -= strides[axis] * shape[axis] as u64;
            index[axis] = 0;
        }
        Some(this)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn strided_rows() {
        let mut file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..240).collect();
        file.write_all(&data).unwrap();
        for (shape, strides) in [
            (vec![5, 4], vec![1, 5]),               // transposed
            (vec![4, 3], vec![5, 1]),               // columns of a wider matrix
            (vec![4, 3], vec![6, 2]),               // every second column
            (vec![2, 3, 4, 5], vec![60, 1, 15, 3]), // channels last
            (vec![3, 2, 2], vec![1, 12, 3]),        // columns of columns
            (vec![6], vec![7]),
            (vec![3, 4], vec![0, 1]), // expanded
        ] {
            assert!(readable(&shape, &strides));
            let element =
                |row: usize, i: usize| data[3 + row * strides[0] as usize + offsets(&shape[1..], &strides[1..]).nth(i).unwrap() as usize];
            let end = 3 + span(&shape, &strides);
            let stored = Stored { dtype: Dtype::U8, shape: shape.clone(), range: 3..end, strides: Some(strides.clone()) };
            for rows in [0..shape[0], 1..2, 1..shape[0], 2..2] {
                let columns = shape[1..].iter().product();
                let expected: Vec<u8> = rows.clone().flat_map(|r| (0..columns).map(move |i| (r, i))).map(|(r, i)| element(r, i)).collect();
                let mut buf = vec![9];
                stored.read_rows(&file, rows.clone(), &mut buf).unwrap();
                assert_eq!(buf, expected, "{shape:?} {strides:?} {rows:?}");
            }
        }
        assert_eq!(offsets(&[2, 3], &[1, 2]).collect::<Vec<_>>(), [0, 2, 4, 1, 3, 5]);
        assert_eq!(offsets(&[], &[]).collect::<Vec<_>>(), [0]);
        assert!(!readable(&[4, 4], &[2, 1000]));
    }
}
