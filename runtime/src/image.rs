//! Pictures and videos from files to RGB.
//!
//! What Pillow's `ImageOps.exif_transpose(...).convert("RGB")` gives, but for two things: JPEG decoders differ by a few units
//! in the last place, and 16-bit pictures keep their high bytes (Pillow clips 16-bit grey to white).

use crate::{Error, Result, artifact_dir::read_limited};
use image::{AnimationDecoder, DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, codecs::gif::GifDecoder};
use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Longest file that is read.
const MAX_FILE: u64 = 256 << 20;
/// Most pixels of a picture, and of all frames of a video together.
pub(crate) const MAX_PIXELS: usize = 1 << 28;
/// Most frames of a video.
const MAX_FRAMES: usize = 4096;

/// A picture: `[height, width, 3]`, row-major. Copies share its pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb {
    width: usize,
    height: usize,
    data: Arc<Vec<u8>>,
}

impl Rgb {
    /// `None` if `data` does not have `height * width * 3` bytes, or none.
    pub fn new(width: usize, height: usize, data: Vec<u8>) -> Option<Self> {
        let len = width.checked_mul(height)?.checked_mul(3)?;
        (len > 0 && data.len() == len).then(|| Self { width, height, data: Arc::new(data) })
    }

    /// Pixels per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// `[height, width, 3]`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }
}

/// Reads a PNG, JPEG, WebP or GIF (its first frame), turned as its EXIF orientation says.
///
/// # Errors
/// The file cannot be read, is none of these formats (whatever its name), is damaged, or too large.
pub fn read(path: &Path) -> Result<Rgb> {
    decode(&read_limited(path, MAX_FILE)?).map_err(|why| Error::file(path, why))
}

/// [`read`] of a file's bytes.
///
/// # Errors
/// Why they are no picture.
pub fn decode(bytes: &[u8]) -> Result<Rgb, String> {
    let mut decoder = reader(bytes)?.into_decoder().map_err(explain)?;
    let (w, h) = decoder.dimensions();
    check_size(w, h, 1)?;
    let orientation = decoder.orientation().map_err(explain)?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(explain)?;
    picture.apply_orientation(orientation);
    rgb(&picture)
}

/// Reads a video: a directory of pictures, in the order of their names (numbers in them count as numbers), or an animated GIF.
///
/// # Errors
/// As [`read`]; or there are no frames, too many, or frames of different sizes.
pub fn read_video(path: &Path) -> Result<Vec<Rgb>> {
    let frames = if path.is_dir() {
        let mut files = fs::read_dir(path)
            .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<PathBuf>, _>>())
            .map_err(Error::io(path))?;
        files.retain(|f| f.is_file() && !f.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')));
        files.sort_by_cached_key(|f| natural(&f.file_name().unwrap_or_default().to_string_lossy()));
        if files.len() > MAX_FRAMES {
            return Err(Error::file(path, format!("has {} frames, at most {MAX_FRAMES} are read", files.len())));
        }
        files.iter().map(|f| read(f)).collect::<Result<Vec<_>>>()?
    } else {
        let bytes = read_limited(path, MAX_FILE)?;
        decode_gif(&bytes).map_err(|why| Error::file(path, why))?
    };
    let Some(first) = frames.first() else { return Err(Error::file(path, "has no frames")) };
    let size = |f: &Rgb| (f.width, f.height);
    if let Some((i, other)) = frames.iter().enumerate().find(|(_, f)| size(f) != size(first)) {
        let ((w, h), (w2, h2)) = (size(first), size(other));
        return Err(Error::file(path, format!("frames must have one size: the first is {w}x{h}, frame {} is {w2}x{h2}", i + 1)));
    }
    Ok(frames)
}

fn decode_gif(bytes: &[u8]) -> Result<Vec<Rgb>, String> {
    if reader(bytes)?.format() != Some(ImageFormat::Gif) {
        return Err("is not a GIF; a video is a GIF or a directory of pictures".into());
    }
    let mut decoder = GifDecoder::new(Cursor::new(bytes)).map_err(explain)?;
    decoder.set_limits(limits()).map_err(explain)?;
    let (w, h) = decoder.dimensions();
    check_size(w, h, 1)?;
    let mut frames = vec![];
    for frame in decoder.into_frames() {
        check_size(w, h, frames.len() + 1)?;
        if frames.len() == MAX_FRAMES {
            return Err(format!("has more than {MAX_FRAMES} frames"));
        }
        frames.push(rgb(&DynamicImage::ImageRgba8(frame.map_err(explain)?.into_buffer()))?);
    }
    Ok(frames)
}

fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.max_alloc = Some(8 * MAX_PIXELS as u64);
    limits
}

fn reader(bytes: &[u8]) -> Result<ImageReader<Cursor<&[u8]>>, String> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| e.to_string())?;
    if !matches!(reader.format(), Some(ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP | ImageFormat::Gif)) {
        return Err("is not a picture that can be read: PNG, JPEG, WebP and GIF are".into());
    }
    reader.limits(limits());
    Ok(reader)
}

fn check_size(w: u32, h: u32, frames: usize) -> Result<(), String> {
    let pixels = (w as usize).saturating_mul(h as usize).saturating_mul(frames);
    if pixels == 0 || pixels > MAX_PIXELS {
        return Err(format!("is {w}x{h} pixels, {frames} frames; at most {MAX_PIXELS} pixels are read"));
    }
    Ok(())
}

fn explain(e: ImageError) -> String {
    format!("cannot be decoded: {e}")
}

/// Alpha is dropped, not blended, and of 16 bits the high 8 stay.
fn rgb(picture: &DynamicImage) -> Result<Rgb, String> {
    let (w, h) = (picture.width() as usize, picture.height() as usize);
    let high = |v: &u16| (v >> 8) as u8;
    let grey = |v: &[u8], step: usize| v.iter().step_by(step).flat_map(|v| [*v; 3]).collect();
    let data: Vec<u8> = match picture {
        DynamicImage::ImageLuma8(p) => grey(p, 1),
        DynamicImage::ImageLumaA8(p) => grey(p, 2),
        DynamicImage::ImageRgb8(p) => p.to_vec(),
        DynamicImage::ImageRgba8(p) => p.as_chunks::<4>().0.iter().flat_map(|[r, g, b, _]| [*r, *g, *b]).collect(),
        DynamicImage::ImageLuma16(p) => p.iter().flat_map(|v| [high(v); 3]).collect(),
        DynamicImage::ImageLumaA16(p) => p.iter().step_by(2).flat_map(|v| [high(v); 3]).collect(),
        DynamicImage::ImageRgb16(p) => p.iter().map(high).collect(),
        DynamicImage::ImageRgba16(p) => p.as_chunks::<4>().0.iter().flat_map(|[r, g, b, _]| [high(r), high(g), high(b)]).collect(),
        other => other.to_rgb8().into_raw(),
    };
    Rgb::new(w, h, data).ok_or_else(|| "has no pixels".into())
}

/// A key that sorts `frame2` before `frame10`.
fn natural(name: &str) -> Vec<(u64, String)> {
    let mut key = vec![];
    let mut rest = name;
    while !rest.is_empty() {
        let text: String = rest.chars().take_while(|c| !c.is_ascii_digit()).collect();
        rest = &rest[text.len()..];
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        rest = &rest[digits.len()..];
        key.push((0, text));
        key.push((digits.parse().unwrap_or(u64::MAX), digits));
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_their_numbers() {
        let mut names = ["frame10.png", "frame2.png", "frame1.png", "a.png"];
        names.sort_by_cached_key(|n| natural(n));
        assert_eq!(names, ["a.png", "frame1.png", "frame2.png", "frame10.png"]);
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        for (bytes, part) in
            [(&b""[..], "is not a picture"), (b"text", "is not a picture"), (b"\x89PNG\r\n\x1a\n\0\0", "cannot be decoded")]
        {
            let error = decode(bytes).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
