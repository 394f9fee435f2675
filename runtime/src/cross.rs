//! What decoders take that attend to pictures (Llama 3.2 Vision) rather than have them among their tokens: the features of the
//! tiles that are new, and which token may see which tile.

use crate::{Error, Result, Tensor};
use vlmc_artifact::Entry;

/// The input for features: `f32[batch, tiles, tokens, hidden]`.
pub(crate) const STATES: &str = "cross_attention_states";
/// The input for the mask: `i64[batch, seq, tiles before and new]`.
pub(crate) const MASK: &str = "cross_attention_mask";

/// The tiles in the cache.
#[derive(Default)]
pub(crate) struct Cross {
    /// Of each row, which tiles its last token saw.
    last: Vec<Vec<i64>>,
}

impl Cross {
    /// Whether a decoder attends to pictures.
    pub(crate) fn is_of(decoder: &Entry) -> bool {
        decoder.inputs.iter().any(|p| p.name == STATES)
    }

    /// Forgets all tiles.
    pub(crate) fn clear(&mut self) {
        self.last.clear();
    }

    /// Both inputs of a decoder for `seq` more tokens of each row, from `states`, the tiles of all rows one after the other, and
    /// `mask`, for the tiles in the cache and the new ones. Without a mask, a token sees what the last one saw, and all new tiles.
    ///
    /// # Errors
    /// The rows do not have as many tiles each, or the mask does not fit.
    pub(crate) fn inputs(
        &self,
        decoder: &Entry,
        states: Option<&Tensor>,
        mask: Option<&Tensor>,
        [batch, seq]: [usize; 2],
    ) -> Result<[(String, Tensor); 2]> {
        let port = decoder.inputs.iter().find(|p| p.name == STATES);
        let sizes = port.and_then(|p| if let [_, _, tokens, hidden] = &p.shape[..] { Some([tokens, hidden]) } else { None });
        let sizes = sizes.and_then(|s| Some([s[0].as_const()?, s[1].as_const()?].map(|d| d as usize)));
        let [tokens, hidden] = sizes.ok_or_else(|| Error::Input(format!("the artifact's 'decoder' takes no '{STATES}'")))?;
        let len = states.map_or(Ok(0), |t| t.f32().map(<[f32]>::len))?;
        let row = batch * tokens * hidden;
        if row == 0 || !len.is_multiple_of(row) {
            let shape = states.map(Tensor::shape).unwrap_or_default();
            return Err(Error::Input(format!("'{STATES}' {shape:?} is not of as many tiles for each of {batch} prompts")));
        }
        let (new, before) = (len / row, self.last.first().map_or(0, Vec::len));
        let all = before + new;
        let seen = match mask {
            Some(m) if m.shape().len() >= 3 && m.shape()[..2] == [batch, seq] && m.data().len() == batch * seq * all => m.i64()?.to_vec(),
            Some(m) => {
                let message = format!("'{MASK}' must be [{batch}, {seq}, pictures, tiles] with {all} tiles in all, is {:?}", m.shape());
                return Err(Error::Input(message));
            }
            None => (0..batch)
                .flat_map(|b| {
                    let row = self.last.get(b).into_iter().flatten().copied().chain(std::iter::repeat_n(1, new));
                    row.collect::<Vec<_>>().repeat(seq)
                })
                .collect(),
        };
        let shape = [batch, new, tokens, hidden];
        Ok([
            (STATES.into(), states.map_or_else(|| Tensor::new(shape, Vec::<f32>::new()), |t| t.reshaped(shape))?),
            (MASK.into(), Tensor::new([batch, seq, all], seen)?),
        ])
    }

    /// The tokens of `mask [batch, seq, tiles]` are now in the cache.
    pub(crate) fn advance(&mut self, mask: &Tensor) -> Result<()> {
        let &[_, seq, tiles] = mask.shape() else { return Err(Error::Input(format!("'{MASK}' must have 3 axes"))) };
        let rows = mask.i64()?.chunks(seq * tiles.max(1));
        self.last = if tiles == 0 { vec![] } else { rows.map(|row| row[(seq - 1) * tiles..].to_vec()).collect() };
        Ok(())
    }
}

/// Which tokens from `from` on may see which of `max_tiles` tiles of each picture, `i64[1, tokens, pictures, max_tiles]`: a
/// placeholder opens its picture to itself and the text up to the next placeholder; of placeholders side by side each opens its
/// picture up to where the last does (transformers `get_cross_attention_token_mask`). `tiles` are in use of each picture.
///
/// # Errors
/// The number of placeholders is not that of pictures.
pub(crate) fn mask(ids: &[i64], from: usize, placeholder: i64, tiles: &[usize], max_tiles: usize) -> Result<Tensor> {
    let places: Vec<usize> = (0..ids.len()).filter(|i| ids[*i] == placeholder).collect();
    if places.len() != tiles.len() {
        return Err(Error::Input(format!("the prompt has {} image placeholder(s) for {} images", places.len(), tiles.len())));
    }
    let mut ends: Vec<usize> = places.iter().skip(1).copied().chain([ids.len()]).collect();
    for i in (1..ends.len()).rev() {
        if ends[i - 1] == places[i - 1] + 1 {
            ends[i - 1] = ends[i];
        }
    }
    let mut out = vec![0; (ids.len() - from) * places.len() * max_tiles];
    for (picture, ((start, end), used)) in places.iter().zip(&ends).zip(tiles).enumerate() {
        for token in (*start).max(from)..*end {
            let at = ((token - from) * places.len() + picture) * max_tiles;
            out[at..at + used.min(&max_tiles)].fill(1);
        }
    }
    Tensor::new([1, ids.len() - from, places.len(), max_tiles], out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_seen_up_to_the_next() {
        // Two side by side, and one after a token of text; one tile each but for the second, which has two.
        let m = mask(&[7, 9, 9, 5, 9, 6], 0, 9, &[1, 2, 1], 2).unwrap();
        assert_eq!(m.shape(), [1, 6, 3, 2]);
        let rows: Vec<&[i64]> = m.i64().unwrap().chunks(6).collect();
        assert_eq!(rows[0], [0; 6]);
        assert_eq!(rows[1], [1, 0, 0, 0, 0, 0], "the first opens itself");
        assert_eq!(rows[2], [1, 0, 1, 1, 0, 0], "side by side");
        assert_eq!(rows[3], [1, 0, 1, 1, 0, 0]);
        assert_eq!(rows[4], [0, 0, 0, 0, 1, 0]);
        assert_eq!(rows[5], [0, 0, 0, 0, 1, 0]);
        assert_eq!(mask(&[7, 9, 9, 5, 9, 6], 4, 9, &[1, 2, 1], 2).unwrap().i64().unwrap(), [rows[4], rows[5]].concat());
        assert_eq!(mask(&[7, 5], 1, 9, &[], 4).unwrap().shape(), [1, 1, 0, 4]);
        assert!(mask(&[9, 5], 0, 9, &[1, 1], 4).is_err());
    }
}
