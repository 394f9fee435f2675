//! SHA-256, in lower-case hex as manifests and the hub write it.

use sha2::{Digest, Sha256};
use std::io::{self, Read};

/// Bytes per read: large enough for sequential speed, small against any memory.
pub(crate) const TILE: usize = 1 << 20;

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Reads to the end, a tile at a time.
pub(crate) fn sha256_of(mut reader: impl Read) -> io::Result<String> {
    let (mut hash, mut tile) = (Sha256::new(), vec![0; TILE]);
    loop {
        match reader.read(&mut tile) {
            Ok(0) => return Ok(hex(&hash.finalize())),
            Ok(n) => hash.update(&tile[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// In lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), expected);
        assert_eq!(sha256_of(&b"abc"[..]).unwrap(), expected);
    }
}
