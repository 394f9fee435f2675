//! Resizing that gives the very bytes that Pillow gives (`src/libImaging/Resample.c`): separable, mostly horizontal first,
//! filter weights in 22-bit fixed point, rounded to 8 bits after each pass.

use crate::image::Rgb;
use vlmc_artifact::Resample;

/// Fraction bits of the weights: 32, less 8 for the pixel and 2 for weights beyond 1.
const PRECISION: u32 = 22;

fn support(filter: Resample) -> f64 {
    match filter {
        Resample::Bilinear => 1.0,
        Resample::Bicubic => 2.0,
        Resample::Lanczos => 3.0,
    }
}

fn weight(filter: Resample, x: f64) -> f64 {
    let x = x.abs();
    match filter {
        Resample::Bilinear => (1.0 - x).max(0.0),
        Resample::Bicubic => {
            const A: f64 = -0.5;
            if x < 1.0 {
                ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
            } else if x < 2.0 {
                (((x - 5.0) * x + 8.0) * x - 4.0) * A
            } else {
                0.0
            }
        }
        Resample::Lanczos => {
            let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
            if x < 3.0 { sinc(x) * sinc(x / 3.0) } else { 0.0 }
        }
    }
}

/// First source pixel of an output pixel and the weights from there.
struct Tap {
    start: usize,
    weights: Vec<i32>,
}

fn taps(from: usize, to: usize, filter: Resample) -> Vec<Tap> {
    let scale = from as f64 / to as f64;
    let filter_scale = scale.max(1.0);
    let reach = support(filter) * filter_scale;
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            // Conversions truncate, as in C.
            let start = ((centre - reach + 0.5) as i64).max(0);
            let end = ((centre + reach + 0.5) as i64).min(from as i64);
            let weights: Vec<f64> = (start..end).map(|x| weight(filter, (x as f64 - centre + 0.5) * (1.0 / filter_scale))).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |w: &f64| {
                let w = if sum == 0.0 { *w } else { *w / sum };
                (w * f64::from(1 << PRECISION) + if w < 0.0 { -0.5 } else { 0.5 }) as i32
            };
            Tap { start: start as usize, weights: weights.iter().map(fixed).collect() }
        })
        .collect()
}

fn round(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION - 1);

/// Rows of `from` RGB pixels each, resampled to `to` pixels.
fn horizontal(data: &[u8], from: usize, to: usize, filter: Resample) -> Vec<u8> {
    let taps = taps(from, to, filter);
    let mut out = vec![0; data.len() / (from * 3) * to * 3];
    for (from, to) in data.chunks_exact(from * 3).zip(out.chunks_exact_mut((to * 3).max(1))) {
        for (tap, pixel) in taps.iter().zip(to.as_chunks_mut::<3>().0) {
            let mut sum = [HALF; 3];
            for (w, p) in tap.weights.iter().zip(&from.as_chunks::<3>().0[tap.start..]) {
                (0..3).for_each(|c| sum[c] += i32::from(p[c]) * w);
            }
            *pixel = sum.map(round);
        }
    }
    out
}

/// `from` rows of `width` RGB pixels each, resampled to `to` rows.
fn vertical(data: &[u8], width: usize, from: usize, to: usize, filter: Resample) -> Vec<u8> {
    let row = width * 3;
    let mut out = vec![0; to * row];
    let mut sums = vec![0; row];
    for (tap, to) in taps(from, to, filter).iter().zip(out.chunks_exact_mut(row.max(1))) {
        sums.fill(HALF);
        for (w, from) in tap.weights.iter().zip(data[tap.start * row..].chunks_exact(row)) {
            sums.iter_mut().zip(from).for_each(|(s, p)| *s += i32::from(*p) * w);
        }
        to.iter_mut().zip(&sums).for_each(|(o, s)| *o = round(*s));
    }
    out
}

/// `picture` in another size; both sides must be at least 1.
pub fn resize(picture: &Rgb, width: usize, height: usize, filter: Resample) -> Rgb {
    let (w, h) = (picture.width(), picture.height());
    // Since Pillow 13: where the height loses more than twice the pixels that the width loses.
    let vertical_first = height < h && (h - height) as i128 > 2 * (w as i128 - width as i128);
    let mut data = picture.data().to_vec();
    if vertical_first {
        data = vertical(&data, w, h, height, filter);
    }
    if width != w {
        data = horizontal(&data, w, width, filter);
    }
    if height != h && !vertical_first {
        data = vertical(&data, width, h, height, filter);
    }
    Rgb::new(width, height, data).unwrap_or_else(|| picture.clone())
}
