//! Pictures to patches: `Qwen2VLImageProcessor` of transformers, on Pillow.

use super::{Outline, Pixels, channel_tables};
use crate::{Error, Result, Tensor, image::Rgb, prompt::Clip, resize::resize};
use vlmc_artifact::Qwen2VlProcessor;

/// Height and width in whole multiples of `factor`, with a product between `min_pixels` and `max_pixels` and about the same
/// aspect ratio (`smart_resize` of transformers; halves are rounded to even).
///
/// # Errors
/// The longer side is more than 200 times the shorter.
pub fn smart_resize(height: usize, width: usize, factor: usize, min_pixels: usize, max_pixels: usize) -> Result<(usize, usize)> {
    let (h, w, f) = (height as f64, width as f64, factor as f64);
    if h.max(w) / h.min(w) > 200.0 {
        return Err(Error::Input(format!("a picture of {width}x{height} is too narrow: one side may be at most 200 times the other")));
    }
    let nearest = |x: f64| ((x / f).round_ties_even() * f) as usize;
    let (h_bar, w_bar) = (nearest(h), nearest(w));
    Ok(if h_bar * w_bar > max_pixels {
        let beta = (h * w / max_pixels as f64).sqrt();
        let below = |x: f64| factor.max((x / beta / f).floor() as usize * factor);
        (below(h), below(w))
    } else if h_bar * w_bar < min_pixels {
        let beta = (min_pixels as f64 / (h * w)).sqrt();
        let above = |x: f64| (x * beta / f).ceil() as usize * factor;
        (above(h), above(w))
    } else {
        (h_bar, w_bar)
    })
}

/// As [`smart_resize`], with a budget for all frames (transformers `video_processing_qwen3_vl.py`).
fn resize_clip(frames: usize, height: usize, width: usize, p: &Qwen2VlProcessor) -> Result<(usize, usize)> {
    let factor = p.patch_size * p.merge_size;
    let (mut height, mut width) = (height, width);
    if height < factor || width < factor {
        let scale = (factor as f64 / height as f64).max(factor as f64 / width as f64);
        (height, width) = ((height as f64 * scale) as usize, (width as f64 * scale) as usize);
    }
    let (n, h, w, f) = (frames as f64, height as f64, width as f64, factor as f64);
    if h.max(w) / h.min(w) > 200.0 {
        return Err(Error::Input(format!("a video of {width}x{height} is too narrow: one side may be at most 200 times the other")));
    }
    let nearest = |x: f64, f: f64| ((x / f).round_ties_even() * f) as usize;
    let (t_bar, h_bar, w_bar) = (nearest(n, p.temporal_patch_size as f64), nearest(h, f), nearest(w, f));
    let pixels = t_bar * h_bar * w_bar;
    Ok(if pixels > p.video_max_pixels {
        let beta = (n * h * w / p.video_max_pixels as f64).sqrt();
        let below = |x: f64| factor.max((x / beta / f).floor() as usize * factor);
        (below(h), below(w))
    } else if pixels < p.video_min_pixels {
        let beta = (p.video_min_pixels as f64 / (n * h * w)).sqrt();
        let above = |x: f64| (x * beta / f).ceil() as usize * factor;
        (above(h), above(w))
    } else {
        (h_bar, w_bar)
    })
}

/// See [`super::outline`].
pub(super) fn outline(p: &Qwen2VlProcessor, width: usize, height: usize) -> Result<Outline> {
    let (height, width) = smart_resize(height, width, p.patch_size * p.merge_size, p.min_pixels, p.max_pixels)?;
    let patches = (height / p.patch_size) * (width / p.patch_size);
    let pixels = vec![patches, 3 * p.temporal_patch_size * p.patch_size * p.patch_size];
    let tokens = patches / (p.merge_size * p.merge_size);
    Ok(Outline::new([("pixel_values", pixels), ("image_grid_thw", vec![1, 3])], tokens))
}

/// Patches of a picture, which stands for `temporal_patch_size` equal frames.
pub(super) fn image(p: &Qwen2VlProcessor, picture: &Rgb) -> Result<Pixels> {
    patches(p, std::slice::from_ref(picture), p.min_pixels, p.max_pixels)
}

/// Patches of a video; the last frame is repeated to fill the last group.
pub(super) fn video(p: &Qwen2VlProcessor, frames: &[Rgb]) -> Result<Pixels> {
    patches(p, frames, p.video_min_pixels, p.video_max_pixels)
}

/// See [`super::times`].
pub(super) fn times(p: &Qwen2VlProcessor, frames: usize) -> Vec<f64> {
    let seconds = |frame: usize| frame.min(frames.saturating_sub(1)) as f64 / f64::from(p.fps);
    let (depth, groups) = (p.temporal_patch_size, frames.div_ceil(p.temporal_patch_size));
    (0..groups).map(|g| (seconds(g * depth) + seconds(g * depth + depth - 1)) / 2.0).collect()
}

/// `pixel_values f32[t * h * w, 3 * temporal_patch_size * patch_size²]` and `image_grid_thw i64[1, 3]`: frames (in groups of
/// `temporal_patch_size`), rows and columns of patches.
fn patches(p: &Qwen2VlProcessor, frames: &[Rgb], min_pixels: usize, max_pixels: usize) -> Result<Pixels> {
    let first = frames.first().ok_or_else(|| Error::Input("a video needs at least one frame".into()))?;
    let (patch, merge, depth) = (p.patch_size, p.merge_size, p.temporal_patch_size);
    let (height, width) = (first.height(), first.width());
    let (height, width) = if p.video_budget_of_clip && frames.len() > 1 {
        resize_clip(frames.len(), height, width, p)?
    } else {
        smart_resize(height, width, patch * merge, min_pixels, max_pixels)?
    };
    let table = channel_tables(p.rescale_factor, p.image_mean, p.image_std);
    let resized: Vec<Rgb> = frames.iter().map(|f| resize(f, width, height, p.resample)).collect();
    let (t, h, w) = (frames.len().div_ceil(depth), height / patch, width / patch);
    let mut values = Vec::with_capacity(t * h * w * 3 * depth * patch * patch);
    for group in 0..t {
        for (block_row, block_col, row, col) in (0..h / merge)
            .flat_map(|a| (0..w / merge).flat_map(move |b| (0..merge).flat_map(move |c| (0..merge).map(move |d| (a, b, c, d)))))
        {
            let (y0, x0) = ((block_row * merge + row) * patch, (block_col * merge + col) * patch);
            for (c, table) in table.iter().enumerate() {
                for frame in 0..depth {
                    let data = resized[(group * depth + frame).min(resized.len() - 1)].data();
                    for y in y0..y0 + patch {
                        let pixels = &data[(y * width + x0) * 3..(y * width + x0 + patch) * 3];
                        values.extend(pixels.iter().skip(c).step_by(3).map(|v| table[usize::from(*v)]));
                    }
                }
            }
        }
    }
    let rows = t * h * w;
    let grid = [t as i64, h as i64, w as i64];
    // A group of frames is as long as its frames at the rate of `fps` frames a second.
    let clip = Clip { grid, seconds_per_grid: depth as f32 / p.fps };
    let inputs = [
        ("pixel_values".into(), Tensor::new([rows, values.len() / rows], values)?),
        ("image_grid_thw".into(), Tensor::new([1, 3], grid.to_vec())?),
    ];
    Ok(Pixels { inputs: inputs.into(), tokens: rows / (merge * merge), clip })
}
