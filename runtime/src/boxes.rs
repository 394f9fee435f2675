//! Places in pictures that a model names in its answer, as Qwen-VL and Qwen2-VL write them: `<ref>a dog</ref><box>(10,20),(300,
//! 400)</box>`, in thousandths of the picture's width and height.

use serde::Serialize;

/// A place in a picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// What is there, if the answer says.
    pub label: Option<String>,
    /// Its kind.
    pub shape: Shape,
    /// Points `[x, y]` in thousandths: top left and bottom right of a box, the four corners of a quadrangle.
    pub points: Vec<[i64; 2]>,
}

/// Kind of a [`Region`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Parallel to the picture's sides.
    Box,
    /// Four corners: lines of text.
    Quad,
}

/// Spellings of the marks: Qwen-VL's and those from Qwen2-VL on.
const MARKS: [[[&str; 2]; 3]; 2] = [
    [["<ref>", "</ref>"], ["<box>", "</box>"], ["<quad>", "</quad>"]],
    [["<|object_ref_start|>", "<|object_ref_end|>"], ["<|box_start|>", "<|box_end|>"], ["<|quad_start|>", "<|quad_end|>"]],
];

/// The regions of an answer whose special tokens are part of the text. What is not well formed is left out.
pub fn regions(answer: &str) -> Vec<Region> {
    let mut out = vec![];
    for [reference, a_box, quad] in MARKS {
        let mut label = None;
        let mut rest = answer;
        // The next mark of any kind, then what stands between it and its end.
        while let Some((at, [start, end])) = [reference, a_box, quad].into_iter().filter_map(|m| Some((rest.find(m[0])?, m))).min() {
            // A label names the boxes right after it.
            if !rest[..at].trim().is_empty() {
                label = None;
            }
            let from = at + start.len();
            let Some(len) = rest[from..].find(end) else { break };
            let inner = &rest[from..from + len];
            rest = &rest[from + len + end.len()..];
            if start == reference[0] {
                label = Some(inner.trim().to_string());
                continue;
            }
            let (shape, count) = if start == a_box[0] { (Shape::Box, 2) } else { (Shape::Quad, 4) };
            if let Some(points) = points(inner).filter(|p| p.len() == count) {
                out.push(Region { label: label.clone(), shape, points });
            }
        }
    }
    out
}

/// `(1,2),(3,4)`.
fn points(text: &str) -> Option<Vec<[i64; 2]>> {
    let text = text.trim().strip_prefix('(')?.strip_suffix(')')?;
    text.split(')')
        .map(|point| {
            let (x, y) = point.trim_start_matches([',', ' ', '(']).split_once(',')?;
            Some([x.trim().parse().ok()?, y.trim().parse().ok()?])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_of_an_answer() {
        let answer = "<ref> Woman</ref><box>(451,379),(731,806)</box> and<ref> her dog</ref><box>(219,424),(576,896)</box><box>(1,2),(3,4)</box> \
                      on <box>(5,6),(7, 8)</box><ref>STOP</ref><quad>(1,1),(2,1),(2,2),(1,2)</quad><|im_end|>";
        let region =
            |label: Option<&str>, shape, points: &[[i64; 2]]| Region { label: label.map(String::from), shape, points: points.into() };
        assert_eq!(
            regions(answer),
            [
                region(Some("Woman"), Shape::Box, &[[451, 379], [731, 806]]),
                region(Some("her dog"), Shape::Box, &[[219, 424], [576, 896]]),
                region(Some("her dog"), Shape::Box, &[[1, 2], [3, 4]]),
                region(None, Shape::Box, &[[5, 6], [7, 8]]),
                region(Some("STOP"), Shape::Quad, &[[1, 1], [2, 1], [2, 2], [1, 2]]),
            ]
        );
        let answer = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>";
        assert_eq!(regions(answer), [region(Some("cat"), Shape::Box, &[[1, 2], [3, 4]])]);
    }

    #[test]
    fn what_is_not_well_formed_is_left_out() {
        for answer in [
            "",
            "(1,2),(3,4)",
            "<box>(1,2),(3,4)",
            "<box>(1,2)</box>",
            "<box>(a,2),(3,4)</box>",
            "<box></box>",
            "<quad>(1,2),(3,4)</quad>",
            "</box><box>",
        ] {
            assert_eq!(regions(answer), [], "{answer}");
        }
    }
}
