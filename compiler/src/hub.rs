//! Finding a checkpoint by name: a directory, the local Hugging Face cache, or (with the feature `hub`) a download into that
//! cache, in the layout of `huggingface_hub`, which shares it.

use crate::{
    Error, Result,
    arch::{ARCHITECTURES, Architecture},
};
use std::path::{Path, PathBuf};

/// Short names of models on the hub, and their ids there: of each family (its first size), and of each size.
pub fn aliases() -> Vec<(&'static str, &'static str)> {
    let of = |a: &'static Architecture| {
        let published = || a.presets.iter().filter(|p| !p.hub.is_empty());
        published().next().map(|p| (a.alias, p.hub)).into_iter().chain(published().map(|p| (p.name, p.hub)))
    };
    ARCHITECTURES.iter().flat_map(of).collect()
}

/// Called with a file name, the bytes done and the bytes in all while a file is downloaded.
pub type Progress<'a> = &'a dyn Fn(&str, u64, u64);

/// The directory of a model: `model` is a directory, a hub id `org/name` or `org/name@revision`, or an alias.
///
/// # Errors
/// It is none of these, not in the cache, and cannot be downloaded: the message says what was looked for and where.
pub fn resolve(model: &str, progress: Progress<'_>) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.into());
    }
    let fail = |message: String| Error::Model { model: model.into(), message };
    let id = aliases().iter().find(|(alias, _)| *alias == model).map_or(model, |(_, id)| *id);
    let (id, revision) = id.split_once('@').unwrap_or((id, "main"));
    let plain = |s: &str| !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let (Some((org, name)), true) = (id.split_once('/'), plain(revision)) else {
        let known: Vec<_> = ARCHITECTURES.iter().map(|a| a.alias).collect();
        let advice =
            format!("give a checkpoint directory, a Hugging Face id such as Qwen/Qwen2-VL-2B-Instruct, or an alias: {}", known.join(", "));
        return Err(fail(format!("there is no such directory, and it is no name of a model; {advice}")));
    };
    if !plain(org) || !plain(name) || path.is_absolute() {
        return Err(fail("there is no such directory".into()));
    }
    let cache = cache_dir().map(|c| c.join(format!("models--{org}--{name}")));
    if let Some(found) = cache.as_ref().and_then(|c| cached(c, revision)) {
        return Ok(found);
    }
    let looked = match &cache {
        Some(c) => format!("'{id}' is not in the Hugging Face cache ({})", c.display()),
        None => "there is no Hugging Face cache: set HF_HOME".into(),
    };
    let advice = "download it elsewhere and give its directory instead";
    #[cfg(feature = "hub")]
    if let Some(cache) = cache {
        if std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| matches!(v.as_str(), "1" | "true" | "TRUE" | "YES" | "ON")) {
            return Err(fail(format!("{looked}, and HF_HUB_OFFLINE is set; {advice}")));
        }
        return download::download(id, revision, &cache, progress)
            .map_err(|why| fail(format!("{looked}, and cannot be downloaded: {why}; {advice}")));
    }
    let _ = progress;
    Err(fail(format!("{looked}, and this build does not download; {advice}")))
}

/// `HF_HUB_CACHE`, `HF_HOME/hub` or `~/.cache/huggingface/hub`.
fn cache_dir() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("HF_HUB_CACHE")
        .or_else(|| var("HF_HOME").map(|d| d.join("hub")))
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("huggingface/hub")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/huggingface/hub")))
}

/// The snapshot of a revision (a branch, tag or commit) that has a config and all weights, in safetensors or PyTorch files.
fn cached(model: &Path, revision: &str) -> Option<PathBuf> {
    let commit = std::fs::read_to_string(model.join("refs").join(revision)).map_or_else(|_| revision.to_string(), |c| c.trim().to_string());
    if commit.contains(['/', '.']) {
        return None;
    }
    let dir = model.join("snapshots").join(commit);
    let shards = |index: &str| crate::checkpoint::shards_of_index(&std::fs::read(dir.join(index)).ok()?).ok();
    let complete = crate::checkpoint::LAYOUTS
        .iter()
        .any(|(file, index)| dir.join(file).is_file() || shards(index).is_some_and(|s| s.values().all(|shard| dir.join(shard).is_file())));
    let has_config = [crate::checkpoint::CONFIG, crate::checkpoint::OPEN_CLIP_CONFIG].iter().any(|f| dir.join(f).is_file());
    (complete && has_config).then_some(dir)
}

#[cfg(feature = "hub")]
mod download {
    use super::Progress;
    use sha2::{Digest, Sha256};
    use std::{
        fs::{self, File},
        io::{Read, Write},
        path::{Path, PathBuf},
        time::Duration,
    };
    use ureq::{Agent, http::Response, tls::TlsConfig};

    type Done<T> = Result<T, String>;

    fn text(e: impl std::fmt::Display) -> String {
        e.to_string()
    }

    struct Hub {
        agent: Agent,
        endpoint: String,
        token: Option<String>,
    }

    /// Files that a compiler can use; PyTorch weights only where there are no safetensors.
    fn wanted(name: &str) -> bool {
        crate::checkpoint::is_file_name(name)
            && (name.ends_with(".json") || name.ends_with(".jinja") || is_safetensors(name) || is_pytorch(name))
    }

    fn is_safetensors(name: &str) -> bool {
        ["model", "open_clip_model"].iter().any(|n| name.starts_with(n)) && name.ends_with(".safetensors")
    }

    fn is_pytorch(name: &str) -> bool {
        ["pytorch_model", "open_clip_pytorch_model"].iter().any(|n| name.starts_with(n)) && name.ends_with(".bin")
    }

    pub(super) fn download(id: &str, revision: &str, cache: &Path, progress: Progress<'_>) -> Done<PathBuf> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        // Redirects are followed by hand: the answer before the redirect names the file's digest.
        let config = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(20)))
            .tls_config(TlsConfig::builder().build())
            .build();
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let hub = Hub { agent: config.into(), endpoint: endpoint.trim_end_matches('/').into(), token: var("HF_TOKEN") };

        #[derive(serde::Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url = format!("{}/api/models/{id}/revision/{revision}", hub.endpoint);
        let mut body = String::new();
        let answer = hub.get(&url, 0)?;
        answer.into_body().into_reader().take(64 << 20).read_to_string(&mut body).map_err(text)?;
        let info: Info = serde_json::from_str(&body).map_err(|e| format!("{url}: unexpected answer: {e}"))?;
        if !info.sha.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(format!("{url}: unexpected answer: '{}' is no commit", info.sha));
        }
        let mut files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).filter(|n| wanted(n)).collect();
        // A repository of open_clip may have the same weights for transformers, and then their processor, or one tower for timm.
        if files.iter().any(|f| f == crate::checkpoint::OPEN_CLIP_CONFIG) {
            let transformers = files.iter().any(|f| f == "preprocessor_config.json");
            files.retain(|f| !is_safetensors(f) && !is_pytorch(f) || f.starts_with("open_clip") != transformers);
        }
        if files.iter().any(|f| is_safetensors(f)) {
            files.retain(|f| !is_pytorch(f));
        } else if !files.iter().any(|f| is_pytorch(f)) {
            return Err(format!("'{id}' has neither safetensors nor PyTorch weights"));
        }
        let snapshot = cache.join("snapshots").join(&info.sha);
        for dir in [&snapshot, &cache.join("blobs"), &cache.join("refs")] {
            fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        }
        for name in files {
            if !snapshot.join(&name).exists() {
                let url = format!("{}/{id}/resolve/{}/{name}", hub.endpoint, info.sha);
                hub.file(&url, &name, cache, &snapshot, progress)?;
            }
        }
        fs::write(cache.join("refs").join(revision), &info.sha).map_err(text)?;
        Ok(snapshot)
    }

    impl Hub {
        fn call(&self, url: &str, from: u64) -> Done<Response<ureq::Body>> {
            let mut request = self.agent.get(url).header("user-agent", concat!("vlmc/", env!("CARGO_PKG_VERSION")));
            // The token is for the hub, not for where it redirects to.
            if let Some(token) = self.token.as_ref().filter(|_| url.starts_with(&self.endpoint)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            request.call().map_err(|e| format!("{url}: {e}"))
        }

        /// The answer after all redirects; an error for anything but success.
        fn get(&self, url: &str, from: u64) -> Done<Response<ureq::Body>> {
            let mut url = url.to_string();
            for _ in 0..8 {
                let answer = self.call(&url, from)?;
                match answer.status().as_u16() {
                    200 | 206 => return Ok(answer),
                    301 | 302 | 303 | 307 | 308 => {
                        let location = answer.headers().get("location").and_then(|l| l.to_str().ok()).unwrap_or_default();
                        url = if location.starts_with('/') { format!("{}{location}", self.endpoint) } else { location.into() };
                    }
                    401 | 403 => return Err(format!("{url}: access denied; if the model is gated, set HF_TOKEN")),
                    404 => return Err(format!("{url}: not found")),
                    code => return Err(format!("{url}: the server answered {code}")),
                }
            }
            Err(format!("{url}: too many redirects"))
        }

        fn file(&self, url: &str, name: &str, cache: &Path, snapshot: &Path, progress: Progress<'_>) -> Done<()> {
            let first = self.call(url, 0)?;
            let header = |n: &str| {
                first.headers().get(n).and_then(|v| v.to_str().ok()).map(|v| v.trim_start_matches("W/").trim_matches('"').to_string())
            };
            let etag = header("x-linked-etag")
                .or_else(|| header("etag"))
                .filter(|e| !e.is_empty() && e.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
            let etag = etag.ok_or_else(|| match first.status().as_u16() {
                200..=399 => format!("{url}: the server names no version of the file"),
                code => format!("{url}: the server answered {code}"),
            })?;
            drop(first);
            let blob = cache.join("blobs").join(&etag);
            if !blob.exists() {
                let part = cache.join("blobs").join(format!("{etag}.incomplete"));
                let have = fs::metadata(&part).map_or(0, |m| m.len());
                let answer = self.get(url, have)?;
                let resumed = answer.status().as_u16() == 206;
                let have = if resumed { have } else { 0 };
                let length = answer.headers().get("content-length").and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
                let total = length.map_or(0, |l| l + have);
                let mut file = File::options().create(true).append(resumed).write(true).truncate(!resumed).open(&part).map_err(text)?;
                let mut reader = answer.into_body().into_reader();
                let mut buffer = vec![0; 1 << 20];
                let mut done = have;
                loop {
                    let n = reader.read(&mut buffer).map_err(|e| format!("{url}: {e}"))?;
                    if n == 0 {
                        break;
                    }
                    file.write_all(&buffer[..n]).map_err(|e| format!("{}: {e}", part.display()))?;
                    done += n as u64;
                    progress(name, done, total);
                }
                if length.is_some() && done != total {
                    return Err(format!("{url}: the connection ended after {done} of {total} bytes; run again to go on"));
                }
                // Large files are named by their SHA-256.
                if etag.len() == 64 && sha256(&part)? != etag {
                    let _ = fs::remove_file(&part);
                    return Err(format!("{url}: the file was damaged on its way; run again"));
                }
                fs::rename(&part, &blob).map_err(text)?;
            }
            let link = snapshot.join(name);
            std::os::unix::fs::symlink(Path::new("../../blobs").join(&etag), &link).map_err(|e| format!("{}: {e}", link.display()))
        }
    }

    fn sha256(path: &Path) -> Done<String> {
        let mut file = File::open(path).map_err(text)?;
        let mut sha = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer).map_err(text)? {
                0 => return Ok(sha.finalize().iter().map(|b| format!("{b:02x}")).collect()),
                n => sha.update(&buffer[..n]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_models_are_explained() {
        for name in ["no-such-thing", "../x/y", "/no/such", "a/b/c", "a/..", "qwen2-vl@../x"] {
            let error = resolve(name, &|_, _, _| {}).unwrap_err().to_string();
            assert!(error.starts_with(&format!("model '{name}': there is no such directory")), "{error}");
        }
    }

    #[test]
    fn a_complete_snapshot_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = dir.path().join("snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(dir.path().join("refs")).unwrap();
        std::fs::write(dir.path().join("refs/main"), "abc").unwrap();
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(cached(dir.path(), "main"), None, "there are no weights");
        std::fs::write(snapshot.join("model.safetensors"), "").unwrap();
        assert_eq!(cached(dir.path(), "main"), Some(snapshot.clone()));
        assert_eq!(cached(dir.path(), "abc"), Some(snapshot.clone()));
        std::fs::rename(snapshot.join("model.safetensors"), snapshot.join("one.bin")).unwrap();
        std::fs::write(snapshot.join("pytorch_model.bin.index.json"), r#"{"weight_map": {"a": "one.bin", "b": "two.bin"}}"#).unwrap();
        assert_eq!(cached(dir.path(), "abc"), None, "a shard is missing");
        std::fs::write(snapshot.join("two.bin"), "").unwrap();
        assert_eq!(cached(dir.path(), "abc"), Some(snapshot));
        assert_eq!(cached(dir.path(), ".."), None);
    }
}
