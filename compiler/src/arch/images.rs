//! `preprocessor_config.json` of pictures that become one size.

use super::{SideFiles, config::Section};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::ops::RangeInclusive;
use vlmc_artifact::{CenterCrop, Processor, Resample, Resize, StandardProcessor};

/// Statistics of OpenAI's CLIP.
pub(super) const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Statistics of OpenAI's CLIP.
pub(super) const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];
/// -1 to 1.
pub(super) const HALF: [f32; 3] = [0.5; 3];

const SIDE: RangeInclusive<usize> = 1..=16384;

/// What an image processor does that its config does not mention.
pub(super) struct Defaults {
    /// Of `size`.
    pub(super) resize: Resize,
    /// Side of the crop, if there is one.
    pub(super) crop: Option<usize>,
    pub(super) resample: Resample,
    pub(super) mean: [f32; 3],
    pub(super) std: [f32; 3],
}

/// `CLIPImageProcessor`.
pub(super) const CLIP: Defaults =
    Defaults { resize: Resize::ShortestEdge { edge: 224 }, crop: Some(224), resample: Resample::Bicubic, mean: CLIP_MEAN, std: CLIP_STD };

/// Reads `preprocessor_config.json`, if there is one, with `read`; its errors name the file.
pub(super) fn read(files: &SideFiles, read: impl FnOnce(&Section<'_>) -> Result<Processor>) -> Result<Option<Processor>> {
    let Some(image) = &files.preprocessor else { return Ok(None) };
    let file = |e: Error| match e {
        Error::Config { field, message } => {
            Error::File { path: "preprocessor_config.json".into(), message: format!("`{field}`: {message}") }
        }
        e => e,
    };
    Section::root(image).and_then(|c| read(&c)).map(Some).map_err(file)
}

/// A processor that resizes, crops and normalises; a picture takes `tokens` tokens in a prompt.
pub(super) fn standard(c: &Section<'_>, d: &Defaults, tokens: usize) -> Result<Processor> {
    let flag = |field: &str, default: bool| Ok::<bool, Error>(c.get(field)?.unwrap_or(default));
    let resize = if flag("do_resize", true)? { Some(size(c, d.resize)?) } else { None };
    let crop = if flag("do_center_crop", d.crop.is_some())? { Some(crop(c, d.crop)?) } else { None };
    let (image_mean, image_std) = statistics(c, d.mean, d.std)?;
    Ok(Processor::Standard(StandardProcessor {
        resize,
        crop,
        resample: resample(c, d.resample)?,
        image_mean,
        image_std,
        rescale_factor: rescale_factor(c)?,
        tokens,
    }))
}

/// `image_mean` and `image_std`.
pub(super) fn statistics(c: &Section<'_>, mean: [f32; 3], std: [f32; 3]) -> Result<([f32; 3], [f32; 3])> {
    if c.get("do_normalize")? == Some(false) {
        return Ok(([0.0; 3], [1.0; 3]));
    }
    Ok((c.get("image_mean")?.unwrap_or(mean), c.get("image_std")?.unwrap_or(std)))
}

/// `rescale_factor`.
pub(super) fn rescale_factor(c: &Section<'_>) -> Result<f64> {
    c.only("do_rescale", &[json!(true)])?;
    Ok(c.positive("rescale_factor")?.unwrap_or(1.0 / 255.0))
}

/// `resample`, a filter of Pillow.
pub(super) fn resample(c: &Section<'_>, default: Resample) -> Result<Resample> {
    match c.get::<u32>("resample")? {
        None => Ok(default),
        Some(3) => Ok(Resample::Bicubic),
        Some(2) => Ok(Resample::Bilinear),
        Some(1) => Ok(Resample::Lanczos),
        Some(n) => Err(Error::config("resample", format!("{n} is not supported; supported: 1 (lanczos), 2 (bilinear), 3 (bicubic)"))),
    }
}

/// `size`: `{"height", "width"}`, `{"shortest_edge"}` or, in old files, a number, which means what the class's default does.
fn size(c: &Section<'_>, default: Resize) -> Result<Resize> {
    match c.get::<Value>("size")? {
        None => Ok(default),
        Some(Value::Number(_)) => {
            let side = c.int("size", SIDE)?;
            Ok(match default {
                Resize::Exact { .. } => Resize::Exact { height: side, width: side },
                Resize::ShortestEdge { .. } => Resize::ShortestEdge { edge: side },
            })
        }
        Some(_) => {
            let s = c.section_or_empty("size")?;
            s.only("longest_edge", &[])?;
            Ok(match s.opt_int("shortest_edge", SIDE)? {
                Some(edge) => Resize::ShortestEdge { edge },
                None => Resize::Exact { height: s.int("height", SIDE)?, width: s.int("width", SIDE)? },
            })
        }
    }
}

/// `crop_size`: `{"height", "width"}` or, in old files, a number.
fn crop(c: &Section<'_>, default: Option<usize>) -> Result<CenterCrop> {
    let (height, width) = match c.get::<Value>("crop_size")? {
        Some(Value::Object(_)) => {
            let s = c.section_or_empty("crop_size")?;
            (s.int("height", SIDE)?, s.int("width", SIDE)?)
        }
        _ => {
            let side = c.opt_int("crop_size", SIDE)?.or(default).ok_or_else(|| Error::config("crop_size", "is missing"))?;
            (side, side)
        }
    };
    Ok(CenterCrop { height, width, nearest_even: false })
}
