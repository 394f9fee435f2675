//! What can go wrong when an artifact is loaded and run.

use std::{io, path::PathBuf};

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every variant's message says what is wrong, where, and, if it is not obvious, what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// A file of the artifact (or of the request: a picture) is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The request does not fit the model: tensor names, shapes, ids, number of pictures.
    #[error("{0}")]
    Input(String),
    /// The artifact or the request needs something that this build does not have.
    #[error("{0}")]
    Unsupported(String),
}

impl Error {
    /// For `map_err` on operations on `path`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io { path, cause }
    }

    /// `message` about the content of `path`.
    pub fn file(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::File { path: path.into(), message: message.into() }
    }
}
