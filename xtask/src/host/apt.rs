//! Debian packages, downloaded and unpacked under the target folder; nothing is installed.
//!
//! What was unpacked once is used again until the folder is removed. The system's own package lists are asked first.
//! Where they are missing or too old to download from, lists of our own are fetched into the target folder, which
//! needs no administrator.

use super::{folders, run};
use crate::screen::{self, Progress};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How often a download's progress is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// The package archive.
#[derive(Debug)]
pub(crate) struct Apt {
    /// A folder for each unpacked package.
    cache: PathBuf,
    /// The folder of our own package lists, once they are in use.
    lists: Option<PathBuf>,
}

impl Apt {
    /// The archive that this machine is set up for.
    pub(crate) fn open() -> Result<Self> {
        for program in ["apt-get", "apt-cache", "dpkg"] {
            ensure!(
                run::find(program).is_some(),
                "{program} not found: Debian's own kernel and tools cannot be fetched here; \
                 name a kernel with --kernel and an initrd with --initrd"
            );
        }
        let cache = folders::own("debian")?;
        let lists = cache.join(".lists");
        Ok(Self { cache, lists: lists.join("lists").is_dir().then_some(lists) })
    }

    /// The newest package whose name `matches`, taken from those that `pattern` (a regular expression) finds.
    pub(crate) fn newest(&mut self, pattern: &str, matches: impl Fn(&str) -> bool) -> Result<Option<String>> {
        let unpacked = fs::read_dir(&self.cache)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| matches(name));
        if let Some(name) = newest_of(unpacked) {
            return Ok(Some(name));
        }
        for attempt in 0..2 {
            let found = run::output(self.command("apt-cache").args(["search", "--names-only", pattern]))?;
            let names = found.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned);
            if let Some(name) = newest_of(names.filter(|name| matches(name))) {
                return Ok(Some(name));
            }
            if attempt == 0 {
                self.refresh()?;
            }
        }
        Ok(None)
    }

    /// The folder into which `package` is unpacked, downloaded when it is not there yet.
    pub(crate) fn unpacked(&mut self, package: &str) -> Result<PathBuf> {
        ensure!(is_package_name(package), "`{package}` is no name of a Debian package");
        let folder = self.cache.join(package);
        let root = folder.join("root");
        if root.is_dir() {
            return Ok(root);
        }
        let partial = self.cache.join(format!(".{package}.{}", std::process::id()));
        let result = self.fetch(package, &partial);
        if result.is_ok() && !root.is_dir() {
            // Another xtask may have finished the same package first: then its folder stays.
            let renamed = fs::rename(&partial, &folder);
            ensure!(renamed.is_ok() || root.is_dir(), "cannot make {}", folder.display());
        }
        let _ = fs::remove_dir_all(&partial);
        result.with_context(|| format!("cannot get the Debian package {package}"))?;
        Ok(root)
    }

    /// The version of `package` that lies unpacked.
    pub(crate) fn version(&self, package: &str) -> Result<String> {
        let file = self.cache.join(package).join("version");
        Ok(fs::read_to_string(&file)
            .with_context(|| format!("cannot read {}", file.display()))?
            .trim()
            .to_owned())
    }

    /// The packages on which `package` depends, alternatives included, in the order in which it names them.
    pub(crate) fn dependencies(&mut self, package: &str) -> Result<Vec<String>> {
        ensure!(is_package_name(package), "`{package}` is no name of a Debian package");
        let text = run::output(self.command("apt-cache").args([
            "depends",
            "--no-recommends",
            "--no-suggests",
            "--no-conflicts",
            "--no-breaks",
            "--no-replaces",
            "--no-enhances",
            package,
        ]))?;
        Ok(parse_dependencies(&text))
    }

    /// Downloads and unpacks into `partial`: `root/` and `version`.
    fn fetch(&mut self, package: &str, partial: &Path) -> Result<()> {
        if let Err(first) = self.download(package, partial) {
            screen::note(format_args!("{package}: the package lists at hand do not do; fetching new ones"));
            self.refresh().map_err(|second| first.context(second))?;
            self.download(package, partial)?;
        }
        let archive = fs::read_dir(partial)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt-get downloaded no package")?;
        run::output(Command::new("dpkg").arg("-x").arg(&archive).arg(partial.join("root")))?;
        let name = archive.file_stem().unwrap_or_default().to_string_lossy();
        let version = name.split('_').nth(1).unwrap_or_default().replace("%3a", ":");
        fs::write(partial.join("version"), version)?;
        fs::remove_file(&archive)?;
        Ok(())
    }

    fn download(&self, package: &str, into: &Path) -> Result<()> {
        let _ = fs::remove_dir_all(into);
        fs::create_dir_all(into)?;
        let uris = run::output(self.command("apt-get").args(["--print-uris", "download", package]))?;
        let progress = Progress::start(&format!("downloading {package}"), parse_size(&uris));
        let mut child = self
            .command("apt-get")
            .args(["-q", "download", package])
            .current_dir(into)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(into.join("log"))?)
            .spawn()
            .context("cannot run apt-get")?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            progress.at(bytes_below(into));
            std::thread::sleep(LOOK);
        };
        if !status.success() {
            bail!("apt-get download {package}: {status}\n{}", run::tail(&fs::read(into.join("log"))?));
        }
        Ok(())
    }

    /// Fetches package lists of our own and uses them from here on.
    fn refresh(&mut self) -> Result<()> {
        let lists = self.cache.join(".lists");
        fs::create_dir_all(lists.join("lists/partial"))?;
        fs::create_dir_all(lists.join("cache/archives/partial"))?;
        self.lists = Some(lists);
        let _progress = Progress::start("fetching Debian's package lists", None);
        run::output(self.command("apt-get").args(["-q", "update"]))?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        // Folders below the target folder are not for apt's own user; what is fetched is verified all the same.
        command.args(["-o", "APT::Sandbox::User="]);
        if let Some(lists) = &self.lists {
            command.arg("-o").arg(format!("Dir::State::Lists={}", lists.join("lists").display()));
            command.arg("-o").arg(format!("Dir::Cache={}", lists.join("cache").display()));
        }
        command
    }
}

/// Whether apt takes `name` for a package and nothing else (Debian policy, section 5.6.1).
fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'+' | b'-' | b'.'))
}

/// The last name in the order of the numbers in it.
fn newest_of(names: impl Iterator<Item = String>) -> Option<String> {
    names.max_by_key(|name| {
        let parts = name.split(|letter: char| !letter.is_ascii_digit());
        (parts.filter_map(|part| part.parse::<u64>().ok()).collect::<Vec<_>>(), name.clone())
    })
}

/// Names after `Depends:` and `PreDepends:`, and the providers listed under a virtual package.
fn parse_dependencies(text: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let mut listed = false;
    for line in text.lines().skip(1) {
        let word = match line.trim_start_matches([' ', '|']).split_once("epends: ") {
            Some(("D" | "PreD", word)) => {
                listed = true;
                word
            }
            None if listed && line.starts_with("    ") => line.trim(),
            _ => {
                listed = false;
                continue;
            }
        };
        let word = word.split(':').next().unwrap_or(word);
        if is_package_name(word) && !names.iter().any(|name| name == word) {
            names.push(word.to_owned());
        }
    }
    names
}

/// The third word of `'URI' file size hash`.
fn parse_size(uris: &str) -> Option<u64> {
    uris.lines().find(|line| line.starts_with('\''))?.split_whitespace().nth(2)?.parse().ok()
}

/// Bytes of all files directly in `folder`.
fn bytes_below(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten();
    files.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_ordered_by_number() {
        let names = ["linux-image-6.1.0-9-x", "linux-image-6.1.0-56-x", "linux-image-6.1.0-47-x"];
        assert_eq!(newest_of(names.iter().map(ToString::to_string)).as_deref(), Some(names[1]));
        assert_eq!(newest_of(std::iter::empty()), None);
    }

    #[test]
    fn dependencies_are_read_with_alternatives_and_providers() {
        let text = "stress-ng\n  PreDepends: dpkg\n  Depends: libc6\n |Depends: libegl1\n  Depends: <libegl1-x11>\n    \
                    libegl-mesa0\n  Suggests: perl\n    other\n  Depends: libc6\n  Depends: python3:any\n";
        assert_eq!(parse_dependencies(text), ["dpkg", "libc6", "libegl1", "libegl-mesa0", "python3"]);
    }

    #[test]
    fn sizes_come_from_the_line_with_the_address() {
        let text = "'http://deb.debian.org/x_1_amd64.deb' x_1_amd64.deb 2363100 SHA256:8f8e\n";
        assert_eq!(parse_size(text), Some(2_363_100));
        assert_eq!(parse_size(""), None);
    }

    #[test]
    fn options_and_paths_are_no_package_names() {
        assert!(
            is_package_name("libstdc++6") && is_package_name("linux-image-6.1.0-56-cloud-amd64-unsigned")
        );
        for name in ["", "a", "-y", "--version", "../x", "a b", "A", "x:i386", "x=1"] {
            assert!(!is_package_name(name), "{name}");
        }
    }
}
