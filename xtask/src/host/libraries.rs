//! Which files of which packages make a package's programs run: exactly those that the dynamic loader will ask for.
//!
//! Pure but for what the [`Source`] does. A library is looked for in the package that needs it, then in the packages
//! it depends on, the nearest first; packages are fetched only as long as something is still missing.

use super::apt::Apt;
use super::needs::{self, Needs};
use anyhow::{Result, bail};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

/// Folders in which Debian's loader looks by itself; what lies elsewhere is put into the first.
const LOADER_FOLDERS: [&str; 4] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib", "usr/lib"];

/// Packages and what they hold.
pub(crate) trait Source {
    /// The packages that `package` names as its dependencies.
    fn dependencies(&mut self, package: &str) -> Result<Vec<String>>;
    /// The file or link called `name` in `package`: its path within it.
    fn find(&mut self, package: &str, name: &str) -> Result<Option<String>>;
    /// What the file at `path` in `package` needs.
    fn needs(&mut self, package: &str, path: &str) -> Result<Needs>;
}

/// A file to be taken from a package.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Taken {
    /// The package.
    pub(crate) package: String,
    /// Its path there.
    pub(crate) path: String,
}

/// What must be added so that the files `programs` of `package` run: where it goes (no leading slash), what it is.
pub(crate) fn close(
    source: &mut impl Source,
    package: &str,
    programs: &[String],
) -> Result<BTreeMap<String, Taken>> {
    let mut placed = BTreeMap::new();
    let mut known = HashSet::new();
    let mut queue: VecDeque<Taken> =
        programs.iter().map(|path| Taken { package: package.to_owned(), path: path.clone() }).collect();
    while let Some(file) = queue.pop_front() {
        let needs = source.needs(&file.package, &file.path)?;
        let interpreter = needs.interpreter.iter().map(|path| {
            let path = path.trim_start_matches('/');
            (path.rsplit('/').next().unwrap_or(path), Some(path))
        });
        for (name, place) in needs.libraries.iter().map(|name| (name.as_str(), None)).chain(interpreter) {
            if !known.insert((name.to_owned(), place.map(str::to_owned))) {
                continue;
            }
            let Some(found) = search(source, &file.package, name)? else {
                bail!("{} in {} needs {name}, which no package it depends on holds", file.path, file.package);
            };
            let place = match (place, found.path.rsplit_once('/')) {
                (Some(place), _) => place.to_owned(),
                (None, Some((folder, _))) if LOADER_FOLDERS.contains(&folder) => found.path.clone(),
                _ => format!("{}/{name}", LOADER_FOLDERS[0]),
            };
            placed.insert(place, found.clone());
            queue.push_back(found);
        }
    }
    Ok(placed)
}

/// Looks for `name` in `package`, then outward among what it depends on.
fn search(source: &mut impl Source, package: &str, name: &str) -> Result<Option<Taken>> {
    let mut seen = HashSet::from([package.to_owned()]);
    let mut ring = vec![package.to_owned()];
    while !ring.is_empty() {
        for package in &ring {
            if let Some(path) = source.find(package, name)? {
                return Ok(Some(Taken { package: package.clone(), path }));
            }
        }
        let mut next = Vec::new();
        for package in &ring {
            for dependency in source.dependencies(package)? {
                if seen.insert(dependency.clone()) {
                    next.push(dependency);
                }
            }
        }
        ring = next;
    }
    Ok(None)
}

/// Debian's archive as a source.
#[derive(Debug)]
pub(crate) struct Archive<'a> {
    /// Where packages come from.
    pub(crate) apt: &'a mut Apt,
    dependencies: BTreeMap<String, Vec<String>>,
    files: BTreeMap<String, Vec<String>>,
}

impl<'a> Archive<'a> {
    /// A source that downloads through `apt`.
    pub(crate) fn new(apt: &'a mut Apt) -> Self {
        Self { apt, dependencies: BTreeMap::new(), files: BTreeMap::new() }
    }

    /// The paths of all files and links in `package`, sorted.
    pub(crate) fn files(&mut self, package: &str) -> Result<&[String]> {
        if !self.files.contains_key(package) {
            let root = self.apt.unpacked(package)?;
            let mut files = Vec::new();
            list(&root, "", &mut files)?;
            files.sort_unstable();
            self.files.insert(package.to_owned(), files);
        }
        Ok(&self.files[package])
    }
}

impl Source for Archive<'_> {
    fn dependencies(&mut self, package: &str) -> Result<Vec<String>> {
        if !self.dependencies.contains_key(package) {
            let names = self.apt.dependencies(package)?;
            self.dependencies.insert(package.to_owned(), names);
        }
        Ok(self.dependencies[package].clone())
    }

    fn find(&mut self, package: &str, name: &str) -> Result<Option<String>> {
        let root = self.apt.unpacked(package)?;
        // The shortest path: variants for particular processors and for debugging lie deeper.
        let paths = self.files(package)?.iter().filter(|path| path.rsplit('/').next() == Some(name));
        let path =
            paths.filter(|path| resolve(&root, path).is_some()).min_by_key(|path| path.matches('/').count());
        Ok(path.cloned())
    }

    fn needs(&mut self, package: &str, path: &str) -> Result<Needs> {
        let root = self.apt.unpacked(package)?;
        let Some(file) = resolve(&root, path) else { return Ok(Needs::default()) };
        Ok(needs::of(&fs::read(file)?).unwrap_or_default())
    }
}

/// The regular file that `path` means within `root`, links followed there and nowhere else.
pub(crate) fn resolve(root: &Path, path: &str) -> Option<PathBuf> {
    let mut path = path.to_owned();
    // As many links as Linux follows.
    for _ in 0..40 {
        let full = root.join(&path);
        let data = full.symlink_metadata().ok()?;
        if data.is_file() {
            return Some(full);
        }
        let target = fs::read_link(&full).ok()?;
        path = join(&path, target.to_str()?)?;
    }
    None
}

/// The path that a link at `path` with `target` leads to, both within one root; `None` if it leads out of it.
fn join(path: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = match target.strip_prefix('/') {
        Some(_) => Vec::new(),
        None => path.split('/').collect(),
    };
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn list(root: &Path, below: &str, files: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = if below.is_empty() { name } else { format!("{below}/{name}") };
        if entry.file_type()?.is_dir() { list(root, &path, files)? } else { files.push(path) }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packages by name: what they depend on; their files with what those need.
    #[derive(Default)]
    struct Fake {
        dependencies: BTreeMap<&'static str, Vec<&'static str>>,
        files: BTreeMap<(&'static str, &'static str), Needs>,
        looked_into: Vec<String>,
    }

    impl Fake {
        fn file(mut self, package: &'static str, path: &'static str, loader: &str, needs: &[&str]) -> Self {
            let libraries = needs.iter().map(ToString::to_string).collect();
            let interpreter = (!loader.is_empty()).then(|| loader.to_owned());
            self.files.insert((package, path), Needs { interpreter, libraries });
            self
        }
        fn depends(mut self, package: &'static str, on: &[&'static str]) -> Self {
            self.dependencies.insert(package, on.to_vec());
            self
        }
    }

    impl Source for Fake {
        fn dependencies(&mut self, package: &str) -> Result<Vec<String>> {
            Ok(self.dependencies.get(package).into_iter().flatten().map(ToString::to_string).collect())
        }
        fn find(&mut self, package: &str, name: &str) -> Result<Option<String>> {
            self.looked_into.push(package.to_owned());
            let found =
                self.files.keys().find(|key| key.0 == package && key.1.rsplit('/').next() == Some(name));
            Ok(found.map(|key| key.1.to_owned()))
        }
        fn needs(&mut self, package: &str, path: &str) -> Result<Needs> {
            Ok(self
                .files
                .iter()
                .find(|file| *file.0 == (package, path))
                .map(|file| file.1.clone())
                .unwrap_or_default())
        }
    }

    fn tool() -> Fake {
        Fake::default()
            .file("tool", "usr/bin/tool", "/lib64/ld.so.2", &["liba.so.1", "libc.so.6"])
            .file("liba1", "usr/lib/x86_64-linux-gnu/special/liba.so.1", "", &["libb.so.2", "libc.so.6"])
            .file("libb2", "usr/lib/x86_64-linux-gnu/libb.so.2", "", &["libc.so.6"])
            .file("libc6", "lib/x86_64-linux-gnu/libc.so.6", "", &["ld.so.2"])
            .file("libc6", "lib/x86_64-linux-gnu/ld.so.2", "", &[])
            .file("unused", "usr/lib/libunused.so", "", &[])
            .depends("tool", &["libc6", "liba1"])
            .depends("liba1", &["libb2", "libc6"])
            .depends("libb2", &["libc6", "unused"])
            .depends("libc6", &["unused"])
    }

    #[test]
    fn what_is_needed_is_found_and_put_where_the_loader_looks() {
        let placed = close(&mut tool(), "tool", &["usr/bin/tool".to_owned()]).unwrap();
        let places: Vec<_> =
            placed.iter().map(|(place, taken)| (place.as_str(), taken.package.as_str())).collect();
        assert_eq!(
            places,
            [
                ("lib/x86_64-linux-gnu/ld.so.2", "libc6"),
                ("lib/x86_64-linux-gnu/liba.so.1", "liba1"),
                ("lib/x86_64-linux-gnu/libc.so.6", "libc6"),
                ("lib64/ld.so.2", "libc6"),
                ("usr/lib/x86_64-linux-gnu/libb.so.2", "libb2"),
            ]
        );
    }

    #[test]
    fn packages_that_are_not_needed_are_not_looked_into() {
        let mut source = tool();
        close(&mut source, "tool", &["usr/bin/tool".to_owned()]).unwrap();
        assert!(!source.looked_into.contains(&"unused".to_owned()), "{:?}", source.looked_into);
    }

    #[test]
    fn a_library_that_nobody_has_is_named() {
        let mut source = tool().file("tool", "usr/bin/other", "", &["libnowhere.so.9"]);
        let error = close(&mut source, "tool", &["usr/bin/other".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("libnowhere.so.9") && error.contains("usr/bin/other"), "{error}");
    }

    #[test]
    fn circles_end() {
        let mut source = Fake::default()
            .file("a", "lib/liba.so", "", &["libb.so"])
            .file("b", "lib/libb.so", "", &["liba.so"])
            .depends("a", &["b"])
            .depends("b", &["a"]);
        assert_eq!(close(&mut source, "a", &["lib/liba.so".to_owned()]).unwrap().len(), 2);
    }

    #[test]
    fn links_lead_within_the_root() {
        for (path, target, expected) in [
            ("usr/lib/libx.so.1", "libx.so.1.2", Some("usr/lib/libx.so.1.2")),
            ("usr/lib/x/a", "../../lib/b", Some("usr/lib/b")),
            ("lib64/ld", "/lib/ld-2", Some("lib/ld-2")),
            ("a", "../b", None),
        ] {
            assert_eq!(join(path, target).as_deref(), expected, "{path} -> {target}");
        }
    }
}
