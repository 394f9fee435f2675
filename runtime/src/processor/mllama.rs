//! Pictures to tiles: `MllamaImageProcessor` of transformers, on Pillow.

use super::{Outline, Pixels, channel_tables};
use crate::{Result, Tensor, image::Rgb, prompt::Clip, resize::resize};
use vlmc_artifact::MllamaProcessor;

/// Rows and columns of tiles for a picture: of the arrangements in which it need not shrink the one in which it grows least, or
/// if there is none that in which it shrinks least; of equals the one with the fewest tiles (`get_optimal_tiled_canvas`). And the
/// place of the arrangement in the list of all, counted from 1.
fn canvas(height: usize, width: usize, max_tiles: usize, tile: usize) -> ([usize; 2], usize) {
    let all = (1..=max_tiles).flat_map(|h| (1..=max_tiles / h).map(move |w| [h, w]));
    let scale = |[h, w]: [usize; 2]| ((h * tile) as f64 / height as f64).min((w * tile) as f64 / width as f64);
    let better = |(a, scale_a): ([usize; 2], f64), (b, scale_b): ([usize; 2], f64)| match (scale_a >= 1.0, scale_b >= 1.0) {
        (true, false) => true,
        (false, true) => false,
        _ if scale_a == scale_b => a[0] * a[1] < b[0] * b[1],
        (grows, _) => (scale_a < scale_b) == grows,
    };
    let mut best = (([1, 1], scale([1, 1])), 1);
    for (i, arrangement) in all.enumerate() {
        let candidate = (arrangement, scale(arrangement));
        if better(candidate, best.0) {
            best = (candidate, i + 1);
        }
    }
    (best.0.0, best.1)
}

/// Height and width of a picture on a canvas: as large as fits, but it grows only up to the size of a tile
/// (`get_image_size_fit_to_canvas`).
fn fit(height: usize, width: usize, [canvas_height, canvas_width]: [usize; 2], tile: usize) -> [usize; 2] {
    let target = [height.clamp(tile, canvas_height), width.clamp(tile, canvas_width)];
    let (scale_h, scale_w) = (target[0] as f64 / height as f64, target[1] as f64 / width as f64);
    let scaled = |length: usize, scale: f64, most: usize| ((length as f64 * scale).floor() as usize).max(1).min(most);
    if scale_w < scale_h { [scaled(height, scale_w, target[0]), target[1]] } else { [target[0], scaled(width, scale_h, target[1])] }
}

/// See [`super::outline`].
pub(super) fn outline(p: &MllamaProcessor) -> Outline {
    let (tile, tiles) = (p.tile_size, p.max_image_tiles);
    let inputs = [("pixel_values", vec![1, tiles, 3, tile, tile]), ("aspect_ratio_ids", vec![1]), ("aspect_ratio_mask", vec![1, tiles])];
    Outline::new(inputs, 1)
}

/// `pixel_values f32[1, max_image_tiles, 3, tile_size, tile_size]`, `aspect_ratio_ids i64[1]` and `aspect_ratio_mask i64[1,
/// max_image_tiles]`. The clip has the tiles' rows and columns for a grid.
pub(super) fn image(p: &MllamaProcessor, picture: &Rgb) -> Result<Pixels> {
    let (tile, tiles) = (p.tile_size, p.max_image_tiles);
    let (arrangement, id) = canvas(picture.height(), picture.width(), tiles, tile);
    let [rows, columns] = arrangement;
    let [height, width] = fit(picture.height(), picture.width(), [rows * tile, columns * tile], tile);
    let resized = resize(picture, width, height, p.resample);
    let table = channel_tables(p.rescale_factor, p.image_mean, p.image_std);
    // Tiles that are not used stay zeros; the rest of the canvas is black before the normalisation.
    let mut values = vec![0.0; tiles * 3 * tile * tile];
    for (i, out) in values.chunks_exact_mut(tile * tile).enumerate().take(rows * columns * 3) {
        let (at, c) = (i / 3, i % 3);
        let (y0, x0) = (at / columns * tile, at % columns * tile);
        out.fill(table[c][0]);
        let filled = width.saturating_sub(x0).min(tile);
        for (y, out) in (y0..height.min(y0 + tile)).zip(out.chunks_exact_mut(tile)) {
            let pixels = resized.data()[(y * width + x0.min(width)) * 3..].iter().skip(c).step_by(3);
            out[..filled].iter_mut().zip(pixels).for_each(|(o, v)| *o = table[c][usize::from(*v)]);
        }
    }
    let used: Vec<i64> = (0..tiles).map(|i| i64::from(i < rows * columns)).collect();
    let inputs = [
        ("pixel_values".into(), Tensor::new([1, tiles, 3, tile, tile], values)?),
        ("aspect_ratio_ids".into(), Tensor::new([1], vec![id as i64])?),
        ("aspect_ratio_mask".into(), Tensor::new([1, tiles], used)?),
    ];
    Ok(Pixels { inputs: inputs.into(), tokens: 1, clip: Clip::picture([1, rows as i64, columns as i64]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What transformers' functions of these names give.
    #[test]
    fn canvases_are_those_of_the_reference() {
        for ((h, w), arrangement, id, size) in CASES {
            let (got, got_id) = canvas(h, w, 4, 560);
            assert_eq!((got, got_id), (arrangement, id), "{h}x{w}");
            assert_eq!(fit(h, w, got.map(|n| n * 560), 560), size, "{h}x{w}");
        }
    }

    type Case = ((usize, usize), [usize; 2], usize, [usize; 2]);
    const CASES: [Case; 15] = [
        ((1, 1), [1, 1], 1, [560, 560]),
        ((560, 560), [1, 1], 1, [560, 560]),
        ((561, 560), [2, 1], 5, [561, 560]),
        ((560, 561), [1, 2], 2, [560, 561]),
        ((100, 3000), [1, 4], 4, [74, 2240]),
        ((3000, 100), [4, 1], 8, [2240, 74]),
        ((1120, 1120), [2, 2], 6, [1120, 1120]),
        ((1, 5000), [1, 4], 4, [1, 2240]),
        ((4000, 3), [4, 1], 8, [2240, 1]),
        ((480, 640), [1, 2], 2, [480, 640]),
        ((1080, 1920), [2, 2], 6, [630, 1120]),
        ((2000, 1500), [2, 2], 6, [1120, 840]),
        ((559, 1121), [1, 3], 3, [559, 1121]),
        ((300, 300), [1, 1], 1, [560, 560]),
        ((600, 1600), [1, 3], 3, [560, 1493]),
    ];
}
