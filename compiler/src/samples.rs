//! Pictures with prompts to run a model on: for calibration and comparison.

use crate::{Error, Result};
use serde::Deserialize;
use std::{
    fs,
    path::{Path, PathBuf},
};
use vlmc_runtime::{
    Tensors,
    image::{self, Rgb},
    prepare::Preparer,
};

/// Suffixes of picture files.
const PICTURES: [&str; 5] = ["png", "jpg", "jpeg", "webp", "gif"];

/// A picture, a prompt, or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What messages call it.
    pub name: String,
    /// The file of the picture.
    pub image: Option<PathBuf>,
    /// What is asked of the picture, or compared with it.
    pub prompt: Option<String>,
    /// What the model should say, if the list knows.
    pub answer: Option<String>,
}

impl Sample {
    /// The tensors that the model takes of it: of a prompt without the answer.
    ///
    /// # Errors
    /// The picture cannot be read, or the model takes no such sample.
    pub fn tensors(&self, preparer: &Preparer) -> Result<Tensors> {
        self.request(preparer, None)
    }

    /// The tensors of the prompt and the answer, if there is one, as if the model had said it.
    ///
    /// # Errors
    /// As [`Self::tensors`].
    pub fn answered(&self, preparer: &Preparer) -> Result<Tensors> {
        self.request(preparer, self.answer.as_deref())
    }

    fn request(&self, preparer: &Preparer, answer: Option<&str>) -> Result<Tensors> {
        let picture: Option<Rgb> = self.image.as_deref().map(image::read).transpose()?;
        let failed = |e: vlmc_runtime::Error| Error::Request { name: self.name.clone(), message: e.to_string() };
        preparer.request(picture.as_ref(), self.prompt.as_deref(), answer).map_err(failed)
    }
}

/// A line of a list of samples.
#[derive(Deserialize)]
struct Line {
    image: Option<PathBuf>,
    #[serde(alias = "question")]
    prompt: Option<String>,
    answer: Option<String>,
}

/// The samples at `path`, at most `limit`.
///
/// A `.jsonl` file has a sample on each line: `{"image": "a.png", "prompt": "What is it?"}`, where either may be missing, possibly
/// with the right `answer`; the file of a picture is relative to the list. A directory has pictures and texts that belong together by name (`a.png` and
/// `a.txt`), in the order of the names, where either may be missing.
///
/// # Errors
/// There is nothing there, or a line is not a sample.
pub fn read(path: &Path, limit: Option<usize>) -> Result<Vec<Sample>> {
    let mut samples = if path.is_dir() { of_directory(path)? } else { of_list(path)? };
    if samples.is_empty() {
        return Err(Error::file(path, "has no samples: a directory of pictures and texts (a.png, a.txt), or a list (.jsonl), is needed"));
    }
    samples.truncate(limit.unwrap_or(samples.len()));
    Ok(samples)
}

fn of_list(path: &Path) -> Result<Vec<Sample>> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let dir = path.parent().unwrap_or(Path::new(""));
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let number = i + 1;
            let Line { image, prompt, answer } =
                serde_json::from_str(line).map_err(|e| Error::file(path, format!("line {number} is not a sample: {e}")))?;
            if image.is_none() && prompt.is_none() {
                return Err(Error::file(path, format!("line {number} has neither `image` nor `prompt`")));
            }
            Ok(Sample { name: format!("line {number}"), image: image.map(|f| dir.join(f)), prompt, answer })
        })
        .collect()
}

fn of_directory(dir: &Path) -> Result<Vec<Sample>> {
    let entries = fs::read_dir(dir).and_then(|d| d.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>());
    let mut files: Vec<PathBuf> = entries.map_err(Error::io(dir))?.into_iter().filter(|f| f.is_file()).collect();
    files.sort();
    let mut samples: Vec<Sample> = vec![];
    for file in files {
        let suffix = file.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).unwrap_or_default();
        let is_picture = PICTURES.contains(&suffix.as_str());
        if !is_picture && suffix != "txt" {
            continue;
        }
        let name = file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let known = samples.iter().position(|s| s.name == name);
        let at = known.unwrap_or_else(|| {
            samples.push(Sample { name: name.clone(), image: None, prompt: None, answer: None });
            samples.len() - 1
        });
        if !is_picture {
            samples[at].prompt = Some(fs::read_to_string(&file).map_err(Error::io(&file))?.trim().to_string());
        } else if let Some(other) = samples[at].image.replace(file.clone()) {
            return Err(Error::file(dir, format!("has two pictures of one name, {} and {}", other.display(), file.display())));
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_and_lists() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert!(read(dir.path(), None).unwrap_err().to_string().contains("has no samples"));
        for (name, content) in [("b.png", ""), ("a.JPG", ""), ("a.txt", " What?\n"), ("c.txt", "Text."), ("notes.md", "")] {
            fs::write(at(name), content).unwrap();
        }
        let sample = |name: &str, image: Option<&str>, prompt: Option<&str>| Sample {
            name: name.into(),
            image: image.map(at),
            prompt: prompt.map(String::from),
            answer: None,
        };
        let all = [sample("a", Some("a.JPG"), Some("What?")), sample("b", Some("b.png"), None), sample("c", None, Some("Text."))];
        assert_eq!(read(dir.path(), None).unwrap(), all);
        assert_eq!(read(dir.path(), Some(2)).unwrap(), all[..2]);
        fs::write(at("b.webp"), "").unwrap();
        assert!(read(dir.path(), None).unwrap_err().to_string().contains("has two pictures of one name"));

        let list = at("list.jsonl");
        fs::write(&list, "{\"image\": \"b.png\", \"question\": \"Who?\", \"answer\": \"me\"}\n\n{\"prompt\": \"Text.\"}\n").unwrap();
        let first = Sample { answer: Some("me".into()), ..sample("line 1", Some("b.png"), Some("Who?")) };
        assert_eq!(read(&list, None).unwrap(), [first, sample("line 3", None, Some("Text."))]);
        for (text, why) in [("{}", "line 1 has neither `image` nor `prompt`"), ("[", "line 1 is not a sample")] {
            fs::write(&list, text).unwrap();
            assert!(read(&list, None).unwrap_err().to_string().contains(why));
        }
    }
}
