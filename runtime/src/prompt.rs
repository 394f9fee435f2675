//! From pictures and token ids to positions: how many tokens a picture takes, and where each token stands.

use crate::{Error, Result};
use vlmc_artifact::{Positions, PromptRules};

/// Frames, rows and columns of patches of a picture or video.
pub type Grid = [i64; 3];

/// A picture or video in time and space.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// Its patches.
    pub grid: Grid,
    /// Seconds from one group of frames to the next; matters only where positions follow the time.
    pub seconds_per_grid: f32,
}

impl Clip {
    /// A still picture.
    pub fn picture(grid: Grid) -> Self {
        Self { grid, seconds_per_grid: 0.0 }
    }

    /// The runs of placeholders that it has in a prompt: one, or one for each frame.
    pub fn runs(self, rules: &PromptRules) -> Vec<Self> {
        let apart = matches!(rules.positions, Positions::Mrope { frame_text: Some(_), .. });
        // Frames that no prompt can hold are left to be told by the counts.
        let frames = usize::try_from(self.grid[0]).unwrap_or(0).min(rules.max_positions);
        if apart { vec![Self::picture([1, self.grid[1], self.grid[2]]); frames] } else { vec![self] }
    }
}

/// Tokens that a picture or video takes, where that follows from its grid.
///
/// # Errors
/// The grid is empty or does not consist of whole blocks.
pub fn tokens(grid: Grid, rules: &PromptRules) -> Result<usize> {
    let &Positions::Mrope { spatial_merge_size, .. } = &rules.positions else {
        return Err(Error::Input("the model knows no grids".into()));
    };
    let [t, h, w] = grid;
    let merge = spatial_merge_size as i64;
    if t < 1 || h < 1 || w < 1 || merge < 1 || h % merge != 0 || w % merge != 0 {
        return Err(Error::Input(format!("grid_thw {grid:?} must be at least 1 frame, with rows and columns in multiples of {merge}")));
    }
    let tokens = t.checked_mul(h / merge).and_then(|n| n.checked_mul(w / merge)).and_then(|n| usize::try_from(n).ok());
    tokens.ok_or_else(|| Error::Input(format!("grid_thw {grid:?} is too large")))
}

/// Positions of a batch of prompts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PositionIds {
    /// `[3, batch, seq]` (temporal, height, width) or `[batch, seq]`.
    pub ids: Vec<i64>,
    /// Position of the next token of each row, `[batch]`.
    pub next: Vec<i64>,
}

/// Runs of placeholders in prompt order.
struct Media<'a> {
    token: i64,
    clips: std::slice::Iter<'a, Clip>,
    what: &'static str,
}

/// Multimodal positions (Qwen2-VL, section 2.1; transformers 4.45 `get_rope_index`): text counts on; a picture or video at
/// start `s` has `s` + frame, row and column of each token; what follows starts at the largest position so far plus 1. Padded
/// columns (mask 0) get 1 and count for nothing. Each run of placeholders takes the next grids in order, over all rows. Where
/// positions follow the time (Qwen2.5-VL, section 2.1.2), group `i` of frames is at `floor(i * seconds_per_grid *
/// tokens_per_second)`.
///
/// Sequential positions count the live tokens of each row; padded columns get 0.
///
/// `ids` and `mask` are `[batch, seq]`.
///
/// # Errors
/// The prompt has more or fewer placeholders than the grids have tokens.
pub fn positions(ids: &[i64], mask: &[i64], seq: usize, rules: &PromptRules, images: &[Clip], videos: &[Clip]) -> Result<PositionIds> {
    let batch = ids.len().checked_div(seq).unwrap_or(0);
    let Positions::Mrope { spatial_merge_size, tokens_per_second, .. } = &rules.positions else {
        return Ok(sequential(mask, seq, batch));
    };
    let (spatial_merge_size, tokens_per_second) = (*spatial_merge_size, *tokens_per_second);
    let videos: Vec<Clip> = videos.iter().flat_map(|v| v.runs(rules)).collect();
    let merge = spatial_merge_size as i64;
    let mut out = PositionIds { ids: vec![1; 3 * ids.len()], next: vec![0; batch] };
    let mut media = vec![];
    for (token, clips, what) in [(rules.image_token_id, images, "image"), (rules.video_token_id, &videos, "video")] {
        media.extend(token.map(|token| Media { token, clips: clips.iter(), what }));
    }
    for row in 0..batch {
        let live: Vec<usize> = (row * seq..(row + 1) * seq).filter(|i| mask[*i] != 0).collect();
        let mut next = 0;
        let mut at = 0;
        while at < live.len() {
            let Some(m) = media.iter_mut().find(|m| m.token == ids[live[at]]) else {
                (0..3).for_each(|k| out.ids[k * ids.len() + live[at]] = next);
                next += 1;
                at += 1;
                continue;
            };
            let what = m.what;
            let Clip { grid, seconds_per_grid } =
                *m.clips.next().ok_or_else(|| Error::Input(format!("the prompt has more {what}s than were given")))?;
            let n = tokens(grid, rules)?;
            if at + n > live.len() || live[at..at + n].iter().any(|i| ids[*i] != m.token) {
                return Err(Error::Input(format!(
                    "grid_thw {grid:?} of {what} inputs takes {n} tokens, the prompt has fewer placeholders for it"
                )));
            }
            let (h, w) = (grid[1] / merge, grid[2] / merge);
            // The product in f32, as the reference has it.
            let time = |group: i64| match tokens_per_second {
                Some(rate) if m.what == "video" => (group as f32 * seconds_per_grid * rate as f32) as i64,
                _ => group,
            };
            for (i, column) in live[at..at + n].iter().enumerate() {
                let i = i as i64;
                for (k, offset) in [time(i / (h * w)), i / w % h, i % w].into_iter().enumerate() {
                    out.ids[k * ids.len() + column] = next + offset;
                }
            }
            next += (time(grid[0] - 1) + 1).max(h).max(w);
            at += n;
        }
        out.next[row] = next;
    }
    for m in media {
        let left = m.clips.len();
        if left > 0 {
            return Err(Error::Input(format!("{left} more {}s were given than the prompt has placeholders for", m.what)));
        }
    }
    Ok(out)
}

fn sequential(mask: &[i64], seq: usize, batch: usize) -> PositionIds {
    let mut out = PositionIds { ids: vec![0; mask.len()], next: vec![0; batch] };
    for (row, next) in out.next.iter_mut().enumerate() {
        for i in (row * seq..(row + 1) * seq).filter(|i| mask[*i] != 0) {
            out.ids[i] = *next;
            *next += 1;
        }
    }
    out
}

/// Gives each video of a prompt its frames, where the model wants them one by one: `times` has the seconds of each group of
/// frames of each video.
pub fn with_times(text: &str, rules: &PromptRules, times: &[Vec<f64>]) -> String {
    let Positions::Mrope { frame_text: Some(rule), .. } = &rules.positions else { return text.into() };
    let mut parts = text.split(&rule.video);
    let mut out = parts.next().unwrap_or_default().to_string();
    for (i, part) in parts.enumerate() {
        match times.get(i) {
            Some(times) => out.extend(times.iter().map(|t| rule.frame.replace("{seconds}", &format!("{t:.1}")))),
            // One placeholder too many, as the counts will tell.
            None => out.push_str(&rule.video),
        }
        out.push_str(part);
    }
    out
}

/// Which of `ids i64[batch, seq]` stand for pictures.
pub fn images(ids: &[i64], seq: usize, rules: &PromptRules) -> Vec<bool> {
    let Positions::Absolute { image_span: [start, end], .. } = rules.positions else {
        return ids.iter().map(|i| Some(*i) == rules.image_token_id).collect();
    };
    let mut out = Vec::with_capacity(ids.len());
    for row in ids.chunks(seq.max(1)) {
        let mut depth = 0;
        for id in row {
            depth -= i64::from(*id == end);
            out.push(depth > 0);
            depth += i64::from(*id == start);
        }
    }
    out
}

/// How often the trained length is doubled before a prompt fits, where that decides the frequencies of its positions.
pub(crate) fn level(prompt: usize, rules: &PromptRules) -> usize {
    let Positions::Absolute { trained, levels, .. } = rules.positions else { return 0 };
    (0..levels.saturating_sub(1)).take_while(|n| trained.saturating_mul(1 << n.min(&63)) < prompt).count()
}

/// Replaces each single placeholder by as many as its picture or video takes tokens.
///
/// # Errors
/// The prompt has more or fewer placeholders than pictures or videos were given.
pub fn expand(ids: &[i64], rules: &PromptRules, images: &[usize], videos: &[usize]) -> Result<Vec<i64>> {
    for (token, tokens, what) in [(rules.image_token_id, images, "image"), (rules.video_token_id, videos, "video")] {
        let places = ids.iter().filter(|i| Some(**i) == token).count();
        if places != tokens.len() {
            let given = tokens.len();
            return Err(Error::Input(format!("the prompt has {places} {what} placeholder(s), but the number of {what}s given is {given}")));
        }
    }
    let (mut images, mut videos) = (images.iter(), videos.iter());
    let mut out = vec![];
    for id in ids {
        let tokens = if Some(*id) == rules.image_token_id {
            images.next()
        } else if Some(*id) == rules.video_token_id {
            videos.next()
        } else {
            None
        };
        out.extend(std::iter::repeat_n(*id, tokens.copied().unwrap_or(1)));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> PromptRules {
        PromptRules {
            image_token_id: Some(90),
            video_token_id: Some(91),
            hidden_size: 1,
            vocab_size: 100,
            max_positions: 100,
            positions: Positions::Mrope { spatial_merge_size: 2, tokens_per_second: None, frame_text: None },
            tile_side: None,
            template: None,
        }
    }

    #[test]
    fn a_video_longer_than_wide_pushes_the_text_by_its_length() {
        // One text token, 3 frames of 1 x 2 tokens, one text token.
        let ids = [7, 91, 91, 91, 91, 91, 91, 8];
        let p = positions(&ids, &[1; 8], 8, &rules(), &[], &[Clip::picture([3, 2, 4])]).unwrap();
        assert_eq!(p.ids[..8], [0, 1, 1, 2, 2, 3, 3, 4]);
        assert_eq!(p.ids[8..16], [0, 1, 1, 1, 1, 1, 1, 4]);
        assert_eq!(p.ids[16..], [0, 1, 2, 1, 2, 1, 2, 4]);
        assert_eq!(p.next, [5]);
    }

    #[test]
    fn positions_follow_the_time_where_the_model_does() {
        let mut rules = rules();
        rules.positions = Positions::Mrope { spatial_merge_size: 2, tokens_per_second: Some(4.0), frame_text: None };
        let clip = Clip { grid: [3, 2, 2], seconds_per_grid: 0.4 };
        let p = positions(&[7, 91, 91, 91, 8], &[1; 5], 5, &rules, &[], &[clip]).unwrap();
        assert_eq!(p.ids[..5], [0, 1, 2, 4, 5], "0, 1.6 and 3.2, truncated, after the first token");
        assert_eq!(p.next, [6]);
    }

    #[test]
    fn sequential_positions_skip_padding() {
        let rules = PromptRules { positions: Positions::Sequential, ..rules() };
        let p = positions(&[0, 0, 5, 6, 1, 2, 3, 4], &[0, 0, 1, 1, 1, 1, 1, 1], 4, &rules, &[], &[]).unwrap();
        assert_eq!((p.ids, p.next), (vec![0, 0, 0, 1, 0, 1, 2, 3], vec![2, 4]));
    }

    #[test]
    fn adjacent_pictures_and_padding() {
        let ids = [0, 0, 90, 90, 90, 5, 1, 2, 3, 4, 90, 90];
        let mask = [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
        let p = positions(&ids, &mask, 6, &rules(), &[[1, 2, 2], [1, 4, 2], [1, 2, 4]].map(Clip::picture), &[]).unwrap();
        assert_eq!(p.ids[..6], [1, 1, 0, 1, 1, 3], "temporal: pictures start at 0 and 1");
        assert_eq!(p.ids[12..18], [1, 1, 0, 1, 2, 3], "height");
        assert_eq!(p.ids[24 + 6..], [0, 1, 2, 3, 4, 5], "width of the second row");
        assert_eq!(p.next, [4, 6]);
    }

    #[test]
    fn counts_must_match() {
        let ids = [90, 1];
        let grid = [1, 2, 2];
        for (images, videos) in
            [(vec![], vec![]), (vec![grid; 2], vec![]), (vec![grid], vec![grid]), (vec![[1, 4, 2]], vec![]), (vec![[1, 3, 2]], vec![])]
        {
            let clips = |grids: Vec<Grid>| grids.into_iter().map(Clip::picture).collect::<Vec<_>>();
            let error = positions(&ids, &[1, 1], 2, &rules(), &clips(images), &clips(videos)).unwrap_err().to_string();
            assert!(error.contains("image") || error.contains("video") || error.contains("grid_thw"), "{error}");
        }
        assert_eq!(expand(&[1, 90, 91], &rules(), &[2], &[2]).unwrap(), [1, 90, 90, 91, 91]);
        let error = expand(&[1, 90, 90], &rules(), &[1], &[]).unwrap_err().to_string();
        assert_eq!(error, "the prompt has 2 image placeholder(s), but the number of images given is 1");
    }
}
