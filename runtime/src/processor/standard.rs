//! Pictures of one size: resize, crop, normalise, as the image processors of transformers and torchvision do it on Pillow.

use super::{Outline, Pixels, channel_tables};
use crate::{Error, Result, Tensor, image::Rgb, prompt::Clip, resize::resize};
use vlmc_artifact::{CenterCrop, Resize, StandardProcessor};

/// Most pixels of a picture after the resize.
const MAX_PIXELS: usize = 1 << 28;

/// `pixel_values f32[1, 3, height, width]`.
pub(super) fn image(p: &StandardProcessor, picture: &Rgb) -> Result<Pixels> {
    let (height, width) = size(p.resize, picture.width(), picture.height())?;
    let resized = if p.resize.is_some() { resize(picture, width, height, p.resample) } else { picture.clone() };
    let whole = CenterCrop { height, width, nearest_even: false };
    let crop = p.crop.unwrap_or(whole);
    let (top, left) = (offset(height, crop.height, crop.nearest_even), offset(width, crop.width, crop.nearest_even));
    let table = channel_tables(p.rescale_factor, p.image_mean, p.image_std);
    let mut values = Vec::with_capacity(3 * crop.height * crop.width);
    for (c, table) in table.iter().enumerate() {
        for y in 0..crop.height as i64 {
            for x in 0..crop.width as i64 {
                let (y, x) = (y + top, x + left);
                let inside = (0..height as i64).contains(&y) && (0..width as i64).contains(&x);
                let value = if inside { resized.data()[(y as usize * width + x as usize) * 3 + c] } else { 0 };
                values.push(table[usize::from(value)]);
            }
        }
    }
    let pixels = Tensor::new([1, 3, crop.height, crop.width], values)?;
    Ok(Pixels { inputs: [("pixel_values".into(), pixels)].into(), tokens: p.tokens, clip: Clip::picture([1, 1, p.tokens as i64]) })
}

/// See [`super::outline`].
pub(super) fn outline(p: &StandardProcessor, width: usize, height: usize) -> Result<Outline> {
    let (height, width) = size(p.resize, width, height)?;
    let (height, width) = p.crop.map_or((height, width), |c| (c.height, c.width));
    Ok(Outline::new([("pixel_values", vec![1, 3, height, width])], p.tokens))
}

/// Height and width after the resize.
fn size(to: Option<Resize>, w: usize, h: usize) -> Result<(usize, usize)> {
    // A product of integers, divided in f64 and truncated.
    let long = |edge: usize, long: usize, short: usize| (edge.saturating_mul(long) as f64 / short as f64) as usize;
    let (height, width) = match to {
        None => return Ok((h, w)),
        Some(Resize::Exact { height, width }) => (height, width),
        Some(Resize::ShortestEdge { edge }) if h <= w => (edge, long(edge, w, h)),
        Some(Resize::ShortestEdge { edge }) => (long(edge, h, w), edge),
    };
    if height.saturating_mul(width) > MAX_PIXELS {
        return Err(Error::Input(format!("a picture of {w}x{h} is too narrow: it would become one of {width}x{height}")));
    }
    Ok((height, width))
}

/// First row or column of the middle `to` of `from`; negative if there are fewer.
fn offset(from: usize, to: usize, nearest_even: bool) -> i64 {
    let room = from as i64 - to as i64;
    if nearest_even && room > 0 { (room as f64 / 2.0).round_ties_even() as i64 } else { room.div_euclid(2) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_odd_rest() {
        assert_eq!([1, 3, 5, 7].map(|room| offset(10 + room, 10, false)), [0, 1, 2, 3]);
        assert_eq!([1, 3, 5, 7].map(|room| offset(10 + room, 10, true)), [0, 2, 2, 4]);
        assert_eq!(offset(7, 10, false), -2);
    }

    #[test]
    fn the_long_side_is_rounded_down() {
        assert_eq!(size(Some(Resize::ShortestEdge { edge: 10 }), 7, 5).unwrap(), (10, 14));
        assert_eq!(size(Some(Resize::ShortestEdge { edge: 10 }), 3, 5).unwrap(), (16, 10));
        assert_eq!(size(Some(Resize::Exact { height: 4, width: 6 }), 3, 5).unwrap(), (4, 6));
        assert!(size(Some(Resize::ShortestEdge { edge: 1 << 15 }), 1, 5).is_err());
    }
}
