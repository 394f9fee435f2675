//! Text to token ids and back.

use crate::{Error, Result, artifact_dir::read_limited};
use std::path::Path;

/// Longest tokenizer file that is read.
const MAX_FILE: u64 = 256 << 20;

/// A `tokenizer.json`.
pub struct Tokenizer(tokenizers::Tokenizer);

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// The file cannot be read or is not a tokenizer.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = read_limited(path, MAX_FILE)?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::file(path, format!("is not a tokenizer: {e}")))?;
        Ok(Self(inner))
    }

    /// Ids of a text, in which special tokens are recognised. The tokenizer's own special tokens are added, unless the text has the
    /// first of them already, as templates write it.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let encode = |add| self.0.encode(text, add).map_err(|e| Error::Input(format!("the prompt cannot be tokenized: {e}")));
        let mut encoding = encode(true)?;
        if let ([1, ..], [first, second, ..]) = (encoding.get_special_tokens_mask(), encoding.get_ids())
            && first == second
        {
            encoding = encode(false)?;
        }
        Ok(encoding.get_ids().iter().map(|i| i64::from(*i)).collect())
    }

    /// Ids of a text with the tokenizer's own special tokens, at most `max_length`: the end of a longer text is cut off, but not a
    /// special token after it. Padding that the tokenizer may be set to add is left out.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_up_to(&self, text: &str, max_length: usize) -> Result<Vec<i64>> {
        let encoding = self.0.encode(text, true).map_err(|e| Error::Input(format!("a text cannot be tokenized: {e}")))?;
        let live = encoding.get_ids().iter().zip(encoding.get_attention_mask()).zip(encoding.get_special_tokens_mask());
        let mut tokens: Vec<(i64, bool)> =
            live.filter(|((_, live), _)| **live != 0).map(|((id, _), special)| (i64::from(*id), *special != 0)).collect();
        if tokens.len() > max_length {
            let ends = tokens.iter().rev().take_while(|(_, special)| *special).count().min(max_length);
            tokens.drain(max_length - ends..tokens.len() - ends);
        }
        Ok(tokens.into_iter().map(|(id, _)| id).collect())
    }

    /// Text of ids, without special tokens.
    ///
    /// # Errors
    /// The tokenizer cannot decode them.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().filter_map(|i| u32::try_from(*i).ok()).collect();
        self.0.decode(&ids, true).map_err(|e| Error::Input(format!("tokens cannot be decoded: {e}")))
    }

    /// Text of ids, special tokens included.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_all(&self, ids: &[i64]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().filter_map(|i| u32::try_from(*i).ok()).collect();
        self.0.decode(&ids, false).map_err(|e| Error::Input(format!("tokens cannot be decoded: {e}")))
    }

    /// Text of one token as it stands in the vocabulary.
    pub fn token(&self, id: i64) -> Option<String> {
        self.0.id_to_token(u32::try_from(id).ok()?)
    }

    /// A decoder of ids that come one by one.
    pub fn stream(&self) -> Stream<'_> {
        Stream { tokenizer: self, ids: vec![], prefix: 0, read: 0 }
    }
}

/// Decodes ids as they come. A character may take several tokens, and some tokenizers join words by what stands before, so
/// a piece of text is given out only when it is complete, and decoded together with the piece before it.
pub struct Stream<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<i64>,
    prefix: usize,
    read: usize,
}

impl Stream<'_> {
    /// Text that `id` completes; may be empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: i64) -> Result<String> {
        self.ids.push(id);
        self.piece(|text| text.ends_with(char::REPLACEMENT_CHARACTER))
    }

    /// What is left at the end: characters that were never completed.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        self.piece(|_| false)
    }

    fn piece(&mut self, incomplete: impl Fn(&str) -> bool) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.prefix..self.read])?;
        let text = self.tokenizer.decode(&self.ids[self.prefix..])?;
        if text.len() <= before.len() || incomplete(&text) {
            return Ok(String::new());
        }
        (self.prefix, self.read) = (self.read, self.ids.len());
        Ok(text.get(before.len()..).unwrap_or_default().into())
    }
}
