//! Pictures to tiles: `DeepseekVLV2Processor` of github.com/deepseek-ai/DeepSeek-VL2, on Pillow.

use super::{Outline, Pixels, channel_tables};
use crate::{Error, Result, Tensor, image::Rgb, prompt::Clip, resize::resize};
use vlmc_artifact::{DeepseekVl2Processor, Resample};

/// Whether pictures of a conversation with that many are cut into tiles.
pub(super) fn crops(pictures: usize) -> bool {
    pictures <= 2
}

/// The size, of those that may be, that keeps the most pixels of a picture, and of equals the one that wastes the fewest.
fn best_resolution(p: &DeepseekVl2Processor, width: usize, height: usize) -> [usize; 2] {
    let (mut best, mut most, mut least) = ([p.tile_size; 2], 0, usize::MAX);
    for &[w, h] in &p.candidate_resolutions {
        let scale = (w as f64 / width as f64).min(h as f64 / height as f64);
        let kept = ((width as f64 * scale) as usize * (height as f64 * scale) as usize).min(width * height);
        let wasted = w * h - kept.min(w * h);
        if kept > most || (kept == most && wasted < least) {
            (best, most, least) = ([w, h], kept, wasted);
        }
    }
    best
}

/// `picture` as large as fits into `[width, height]`, in the middle of a ground of one colour (Pillow's `ImageOps.pad`).
fn pad(picture: &Rgb, [width, height]: [usize; 2], ground: [u8; 3]) -> Result<Rgb> {
    let (w, h) = (picture.width() as f64, picture.height() as f64);
    let (ratio, wanted) = (w / h, width as f64 / height as f64);
    let rounded = |x: f64| x.round_ties_even() as usize;
    let (inner_width, inner_height) = if ratio > wanted {
        (width, rounded(h / w * width as f64))
    } else if ratio < wanted {
        (rounded(w / h * height as f64), height)
    } else {
        (width, height)
    };
    if inner_width == 0 || inner_height == 0 {
        return Err(Error::Input(format!("a picture of {w}x{h} is too narrow: nothing of it is left in {width}x{height} pixels")));
    }
    let inner = resize(picture, inner_width, inner_height, Resample::Bicubic);
    let (left, top) = if inner_width == width {
        (0, rounded((height - inner_height) as f64 * 0.5))
    } else {
        (rounded((width - inner_width) as f64 * 0.5), 0)
    };
    let mut data = ground.repeat(width * height);
    for (y, row) in inner.data().chunks_exact(inner_width * 3).enumerate() {
        let at = ((top + y) * width + left) * 3;
        data[at..at + row.len()].copy_from_slice(row);
    }
    Rgb::new(width, height, data).ok_or_else(|| Error::Input("a picture has no pixels".into()))
}

/// The size that a picture is cut at.
fn resolution(p: &DeepseekVl2Processor, width: usize, height: usize, pictures: usize) -> [usize; 2] {
    if crops(pictures) { best_resolution(p, width, height) } else { [p.tile_size; 2] }
}

/// See [`super::outline`].
pub(super) fn outline(p: &DeepseekVl2Processor, width: usize, height: usize, pictures: usize) -> Outline {
    let [across, down] = resolution(p, width, height, pictures).map(|side| side / p.tile_size);
    let tokens = tokens(across, down, p.tile_side);
    let images = vec![1, 1 + across * down, 3, p.tile_size, p.tile_size];
    Outline::new([("images", images), ("images_spatial_crop", vec![1, 1, 2]), ("feature_positions", vec![tokens])], tokens)
}

/// `images f32[1, 1 + tiles, 3, tile_size, tile_size]`, the global view first, `images_spatial_crop i64[1, 1, 2]`, tiles across
/// and down, and `feature_positions`.
pub(super) fn image(p: &DeepseekVl2Processor, picture: &Rgb, pictures: usize) -> Result<Pixels> {
    let size = p.tile_size;
    let best = resolution(p, picture.width(), picture.height(), pictures);
    let ground = p.image_mean.map(|mean| (f64::from(mean) * 255.0) as u8);
    let table = channel_tables(1.0 / 255.0, p.image_mean, p.image_std);
    let mut values = vec![];
    for view in [pad(picture, [size; 2], ground)?, pad(picture, best, ground)?] {
        for (top, left) in (0..view.height()).step_by(size).flat_map(|top| (0..view.width()).step_by(size).map(move |left| (top, left))) {
            for (c, table) in table.iter().enumerate() {
                for y in top..top + size {
                    let row = &view.data()[(y * view.width() + left) * 3..][..size * 3];
                    values.extend(row.iter().skip(c).step_by(3).map(|v| table[usize::from(*v)]));
                }
            }
        }
    }
    let (across, down) = (best[0] / size, best[1] / size);
    let tokens = tokens(across, down, p.tile_side);
    let inputs = [
        ("images".into(), Tensor::new([1, 1 + across * down, 3, size, size], values)?),
        ("images_spatial_crop".into(), Tensor::new([1, 1, 2], vec![across as i64, down as i64])?),
        ("feature_positions".into(), Tensor::new([tokens], (0..tokens as i64).collect::<Vec<_>>())?),
    ];
    Ok(Pixels { inputs: inputs.into(), tokens, clip: Clip::picture([1, 1, 1]) })
}

/// Tokens of a picture of `across` x `down` tiles: a global view of `side` x `side` with a newline after each row, a separator, and
/// all tiles as one view.
pub(crate) fn tokens(across: usize, down: usize, side: usize) -> usize {
    let view = |rows: usize, columns: usize| rows.saturating_mul(columns.saturating_add(1));
    view(side, side).saturating_add(1).saturating_add(view(down.saturating_mul(side), across.saturating_mul(side)))
}
