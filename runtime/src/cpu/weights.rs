//! The weight file of a `cpu` artifact, mapped into memory.

use crate::{Error, Result};
use half::{bf16, f16};
use memmap2::{Mmap, MmapMut};
use safetensors::{Dtype, SafeTensors};
use std::{
    collections::BTreeSet,
    fs::File,
    ops::Range,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};
use vlmc_artifact::{
    DType,
    program::{Layout, PANEL, Weight},
    quant::{panel_bytes, plane_bytes},
};
use vlmc_kernels::{Floats, Kernels};

/// Fewer bytes than this are not worth the time that it takes to find out how to read them: caches hold much of them.
const WORTH_A_SAMPLE: usize = 256 << 20;
/// What is read to find out: more than caches hold.
const SAMPLE: usize = 64 << 20;
/// Tokens within which copying weights must pay.
const TOKENS: u32 = 256;
/// Most bytes that a thread copies at once.
const PIECE: usize = 8 << 20;
/// A cache line: copies begin at one.
const LINE: usize = 64;

/// Weights of a program, in its order.
pub(super) struct Weights {
    file: File,
    map: Mmap,
    /// Copies of some, in pages of 2 MiB.
    large: Option<MmapMut>,
    tensors: Vec<Tensor>,
}

struct Tensor {
    name: String,
    /// Where it is in the file.
    range: Range<usize>,
    /// Where its copy begins, if there is one.
    copy: Option<usize>,
    dtype: DType,
    layout: Layout,
}

/// Bytes that are copied.
struct Piece {
    /// Where they are in the file.
    from: Range<usize>,
    /// Where their copy begins.
    to: usize,
}

/// Memory in pages of 2 MiB; `None` if the system has none.
fn large_pages(len: usize) -> Option<MmapMut> {
    let map = MmapMut::map_anon(len).ok()?;
    #[cfg(target_os = "linux")]
    map.advise(memmap2::Advice::HugePage).ok()?;
    cfg!(target_os = "linux").then_some(map)
}

/// Bytes of memory that this process may still take; `None` if the system does not say.
fn spare_memory() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let available =
        read("/proc/meminfo")?.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok())?;
    let number = |path: &str| read(path)?.trim().parse::<usize>().ok();
    let [limit, used] = ["memory.max", "memory.current"].map(|file| number(&format!("/sys/fs/cgroup/{file}")));
    Some((available * 1024).min(limit.map_or(usize::MAX, |limit| limit.saturating_sub(used.unwrap_or(0)))))
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], from: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, from)
}

#[cfg(not(unix))]
fn read_at(_: &File, _: &mut [u8], _: u64) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Type and shape of a weight's tensor in the file.
pub(super) fn stored(w: &Weight) -> Result<(DType, Vec<usize>), String> {
    let (stack, [n, k]) = match (w.layout, w.shape.as_slice()) {
        (Layout::Rows, shape) if w.dtype.scheme().is_none() => return Ok((w.dtype, shape.to_vec())),
        (Layout::Panel16, [n, k]) => (vec![], [*n, *k]),
        (Layout::Planes16, [n, k]) if w.dtype.scheme().is_some_and(|s| plane_bytes(s, *k).is_some()) => (vec![], [*n, *k]),
        (Layout::Panel16, [e, n, k]) => (vec![*e], [*n, *k]),
        (layout, shape) => return Err(format!("of {} and shape {shape:?} cannot lie in {layout:?}", w.dtype)),
    };
    let panels = n.div_ceil(PANEL);
    Ok(match w.dtype.scheme() {
        Some(scheme) => {
            let bytes = panel_bytes(scheme, k).ok_or_else(|| format!("has rows of {k} numbers, which is too many"))?;
            (DType::U8, [stack, vec![panels, bytes]].concat())
        }
        None => (w.dtype, [stack, vec![panels, k, PANEL]].concat()),
    })
}

impl Weights {
    /// Maps the file and finds the program's weights in it.
    ///
    /// The file must not be changed while it is mapped: the operating system would show the change, or end the process if the
    /// file became shorter. Artifacts are replaced by renaming a new directory into place, which leaves mapped files alone.
    #[allow(unsafe_code)]
    pub(super) fn open(path: &Path, weights: &[Weight]) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the bytes are read as plain numbers, of which any are valid; a change of the file by others is excluded by
        // the contract above.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| Error::file(path, format!("is not a safetensors file: {e}")))?;
        let data = header + 8;
        let tensors = weights
            .iter()
            .map(|w| {
                let info = metadata.info(&w.name).ok_or_else(|| Error::file(path, format!("has no tensor '{}'", w.name)))?;
                let wrong = |what: String| Error::file(path, format!("tensor '{}' {what}", w.name));
                let dtype = match info.dtype {
                    Dtype::F32 => DType::F32,
                    Dtype::F16 => DType::F16,
                    Dtype::BF16 => DType::BF16,
                    Dtype::U8 => DType::U8,
                    other => return Err(wrong(format!("has type {other:?}, which is not supported"))),
                };
                let (stored, shape) = stored(w).map_err(wrong)?;
                if dtype != stored || info.shape != shape {
                    return Err(wrong(format!("is {dtype}{:?}, the program wants {stored}{shape:?}", info.shape)));
                }
                let range = data + info.data_offsets.0..data + info.data_offsets.1;
                // A map begins at a page.
                if !range.start.is_multiple_of(dtype.size()) {
                    return Err(wrong(format!("starts at byte {}, which is not aligned", range.start)));
                }
                Ok(Tensor { name: w.name.clone(), range, copy: None, dtype: w.dtype, layout: w.layout })
            })
            .collect::<Result<_>>()?;
        Ok(Self { file, map, large: None, tensors })
    }

    /// Copies weights that every token reads, `chosen` by their numbers, to pages of 2 MiB, if a sample of them is read so much faster
    /// there that this pays within [`TOKENS`] tokens. Where there are no such pages or not the memory, all stays as it is.
    pub(super) fn enlarge(&mut self, kernels: &Kernels, chosen: &BTreeSet<usize>) {
        let (copies, len) = self.copies(chosen);
        if len < WORTH_A_SAMPLE || spare_memory().is_none_or(|spare| spare / 2 < len) {
            return;
        }
        let Some(mut large) = large_pages(len) else { return };
        let pieces = self.pieces(&copies);
        let (sample, rest) = pieces.split_at(pieces.partition_point(|piece| piece.to < SAMPLE));
        let start = Instant::now();
        if !self.copy(kernels, sample, &mut large) {
            return;
        }
        let copying = start.elapsed();
        let before = kernels.read_time(sample.iter().map(|piece| &self.map[piece.from.clone()]));
        let after = kernels.read_time(sample.iter().map(|piece| &large[piece.to..][..piece.from.len()]));
        // Before more is copied, so that nothing is in memory twice.
        self.forget();
        if before.saturating_sub(after) * TOKENS > copying && self.copy(kernels, rest, &mut large) {
            copies.iter().for_each(|(tensor, at)| self.tensors[*tensor].copy = Some(*at));
            self.large = Some(large);
        }
    }

    /// Gives back the pages of the file that reading it has mapped; what is read again comes from the file. If that fails, they only take
    /// memory.
    #[allow(unsafe_code)]
    fn forget(&self) {
        // SAFETY: the map is of a file and never written to, so its pages hold nothing that the file does not.
        let _ = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }

    /// The chosen weights in the order of the file, each with the place of its copy, and the length of all copies.
    fn copies(&self, chosen: &BTreeSet<usize>) -> (Vec<(usize, usize)>, usize) {
        let mut copies: Vec<_> = chosen.iter().map(|tensor| (*tensor, 0)).collect();
        copies.sort_unstable_by_key(|(tensor, _)| self.tensors[*tensor].range.start);
        let mut len = 0;
        for (tensor, at) in &mut copies {
            *at = len;
            len += self.tensors[*tensor].range.len().next_multiple_of(LINE);
        }
        (copies, len)
    }

    /// What to copy, in the order of the copies.
    fn pieces(&self, copies: &[(usize, usize)]) -> Vec<Piece> {
        let of = |(tensor, at): &(usize, usize)| {
            let (range, at) = (self.tensors[*tensor].range.clone(), *at);
            let starts = (0..range.len()).step_by(PIECE);
            starts.map(move |i| Piece { from: range.start + i..range.end.min(range.start + i + PIECE), to: at + i })
        };
        copies.iter().flat_map(of).collect()
    }

    /// Reads pieces from the file, which takes no memory besides; whether that could be done.
    fn copy(&self, kernels: &Kernels, pieces: &[Piece], to: &mut [u8]) -> bool {
        let (mut jobs, mut rest, mut start) = (vec![], to, 0);
        for piece in pieces {
            let (_, after) = rest.split_at_mut(piece.to - start);
            let (bytes, after) = after.split_at_mut(piece.from.len());
            (rest, start) = (after, piece.to + piece.from.len());
            jobs.push((piece.from.start, bytes));
        }
        let failed = AtomicBool::new(false);
        kernels.pool().chunks(&mut jobs, 1, |_, job| {
            for (from, bytes) in job {
                if read_at(&self.file, bytes, *from as u64).is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
            }
        });
        !failed.into_inner()
    }

    /// Bytes of weights in pages of 2 MiB.
    pub(super) fn large_bytes(&self) -> usize {
        self.large.as_ref().map_or(0, |large| large.len())
    }

    /// Elements of weight `i`.
    pub(super) fn floats(&self, i: usize) -> Floats<'_> {
        let t = &self.tensors[i];
        let bytes = match (&self.large, t.copy) {
            (Some(large), Some(at)) => &large[at..][..t.range.len()],
            _ => &self.map[t.range.clone()],
        };
        match t.dtype {
            DType::F16 => Floats::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
            DType::BF16 => Floats::BF16(bytemuck::cast_slice::<u8, bf16>(bytes)),
            DType::Quant(scheme) => Floats::Quant(bytes, scheme),
            _ => Floats::F32(bytemuck::cast_slice(bytes)),
        }
    }

    /// Name of weight `i`.
    pub(super) fn name(&self, i: usize) -> &str {
        &self.tensors[i].name
    }

    /// Order of the elements of weight `i`.
    pub(super) fn layout(&self, i: usize) -> Layout {
        self.tensors[i].layout
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{TensorView, serialize_to_file};

    #[test]
    fn copies_are_what_the_file_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let names = ["a", "b", "c", "d"];
        let data: Vec<Vec<u8>> =
            [4, 1000, 60, 12].iter().enumerate().map(|(i, n)| (0..4 * n).map(|b| (b * 7 + i) as u8).collect()).collect();
        let view = |data| TensorView::new(Dtype::F32, vec![<[u8]>::len(data) / 4], data).unwrap();
        serialize_to_file(names.iter().zip(&data).map(|(n, d)| (*n, view(d))), None, &path).unwrap();
        let weight = |(name, data): (&&str, &Vec<u8>)| Weight {
            name: (*name).into(),
            dtype: DType::F32,
            shape: vec![data.len() / 4],
            layout: Layout::Rows,
        };
        let all: Vec<Weight> = names.iter().zip(&data).map(weight).collect();
        let mut weights = Weights::open(&path, &all).unwrap();
        let (copies, len) = weights.copies(&[0, 1, 3].into());
        let mut large = MmapMut::map_anon(len).unwrap();
        let pieces = weights.pieces(&copies);
        let (first, rest) = pieces.split_at(1);
        for some in [first, rest] {
            assert!(weights.copy(&Kernels::new(2), some, &mut large));
        }
        copies.iter().for_each(|(tensor, at)| weights.tensors[*tensor].copy = Some(*at));
        weights.large = Some(large);
        weights.forget();
        for (i, data) in data.iter().enumerate() {
            let Floats::F32(floats) = weights.floats(i) else { panic!() };
            assert_eq!(bytemuck::cast_slice::<f32, u8>(floats), data);
            let is_copy = !weights.map.as_ptr_range().contains(&floats.as_ptr().cast());
            assert_eq!(is_copy, i != 2);
        }
        // A file that became shorter is not read.
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let mut again = vec![0; len];
        assert!(!weights.copy(&Kernels::new(1), &pieces, &mut again));
    }

    #[test]
    fn quantized_weights_are_bytes_of_panels() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let scheme = "int4g32".parse().unwrap();
        let len = panel_bytes(scheme, 40).unwrap();
        let bytes: Vec<u8> = (0..6 * len).map(|i| i as u8).collect();
        let view = |shape: Vec<usize>| TensorView::new(Dtype::U8, shape, &bytes).unwrap();
        serialize_to_file([("m", view(vec![6, len])), ("e", view(vec![3, 2, len]))], None, &path).unwrap();
        let weight = |name: &str, dtype: DType, shape: &[usize], layout: Layout| {
            let w = Weight { name: name.into(), dtype, shape: shape.to_vec(), layout };
            let weights = Weights::open(&path, &[w]).map_err(|e| e.to_string())?;
            let Floats::Quant(bytes, scheme) = weights.floats(0) else { return Err("not quantized".into()) };
            Ok::<_, String>((bytes.to_vec(), scheme))
        };
        let (int4, panel) = (DType::Quant(scheme), Layout::Panel16);
        assert_eq!(weight("m", int4, &[90, 40], panel), Ok((bytes.clone(), scheme)));
        assert_eq!(weight("e", int4, &[3, 20, 40], panel), Ok((bytes.clone(), scheme)));
        for (name, dtype, shape, layout, why) in [
            ("m", int4, &[97, 40][..], panel, "wants u8[7, 384]"),
            ("m", int4, &[90, 41], panel, "wants u8[6, 448]"),
            ("m", "int8".parse().unwrap(), &[90, 40], panel, "wants u8[6, 704]"),
            ("m", int4, &[90, 40], Layout::Rows, "cannot lie in Rows"),
            ("m", int4, &[90], panel, "cannot lie in Panel16"),
            ("m", int4, &[90, 40], Layout::Planes16, "cannot lie in Planes16"),
            ("e", int4, &[3, 20, 32], Layout::Planes16, "cannot lie in Planes16"),
            ("m", DType::F32, &[90, 32], Layout::Planes16, "cannot lie in Planes16"),
            ("m", int4, &[90, usize::MAX], panel, "too many"),
            ("m", DType::F32, &[90, 40], panel, "wants f32[6, 40, 16]"),
        ] {
            let error = weight(name, dtype, shape, layout).unwrap_err();
            assert!(error.contains(why), "{dtype} {shape:?}: {error}");
        }
    }
}
