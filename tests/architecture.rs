//! The layers hold: what may be used where, and how large a file may grow. See `ARCHITECTURE.md`.

use std::fs;
use std::path::{Path, PathBuf};

/// Files of the crate, relative to `src`, with their lines of code: comments and tests do not count.
fn sources() -> Vec<(String, String)> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&root, &mut found);
    assert!(found.len() > 20, "the sources were not found");
    found
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            let lines: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
            (path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned(), lines.join("\n"))
        })
        .collect()
}

/// `needle` occurs only in files for which `home` holds, and it does occur.
fn lives_in(needle: &str, home: impl Fn(&str) -> bool) {
    let mut seen = false;
    for (path, code) in sources() {
        if code.contains(needle) {
            assert!(home(&path), "{needle} in src/{path}");
            seen = true;
        }
    }
    assert!(seen, "{needle} is used nowhere: the test looks for the wrong thing");
}

#[test]
fn intrinsics_live_in_simd() {
    lives_in("std::arch", |path| path.starts_with("simd/"));
    lives_in("target_feature", |path| path.starts_with("simd/"));
}

#[test]
fn rayon_lives_in_parallel() {
    lives_in("rayon::", |path| path == "parallel/pool.rs");
    lives_in("libloading::", |path| path == "parallel/openmp.rs");
}

#[test]
fn pyo3_lives_in_bindings() {
    lives_in("pyo3", |path| path.starts_with("bindings/"));
}

#[test]
fn unsafe_lives_in_few_places() {
    let homes = ["bindings/dlpack.rs", "parallel/openmp.rs", "parallel/rows.rs", "parallel/turns.rs"];
    lives_in("unsafe {", |path| path.starts_with("simd/") || homes.contains(&path));
    lives_in("unsafe fn", |path| path.starts_with("simd/"));
    lives_in("unsafe extern", |path| path == "parallel/openmp.rs");
    lives_in("unsafe impl", |path| ["parallel/rows.rs", "parallel/turns.rs"].contains(&path));
}

/// Modules from the lowest layer up; those of one entry are equals.
const LAYERS: [&[&str]; 5] =
    [&["error", "dtype", "tensor", "index", "workspace"], &["simd"], &["parallel", "math"], &["kernels"], &["bindings"]];

#[test]
fn modules_use_only_lower_layers() {
    let rank = |module: &str| LAYERS.iter().position(|layer| layer.contains(&module));
    let mut edges = 0;
    for (path, code) in sources() {
        let module = path.split(['/', '.']).next().unwrap();
        if module == "lib" {
            continue;
        }
        let own = rank(module).unwrap_or_else(|| panic!("src/{path} is in no layer"));
        for used in code.split("crate::").skip(1) {
            let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            // A macro or an item of the crate's root is no module.
            if let Some(other) = rank(&used) {
                assert!(other <= own, "src/{path} uses {used}, which is above it");
                edges += 1;
            }
        }
    }
    assert!(edges > 50, "few uses were found: the test looks for the wrong thing");
}

#[test]
fn dispatch_has_no_wildcard() {
    let (_, level) = sources().into_iter().find(|(path, _)| path == "simd/level.rs").unwrap();
    let run = level.split("pub fn run").nth(1).unwrap();
    assert!(!run.contains("_ =>"), "a new level must be a compile error until every dispatch handles it");
}

#[test]
fn files_stay_readable() {
    for (path, _) in sources() {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(&path)).unwrap();
        assert!(text.lines().count() <= 500, "src/{path} has more than 500 lines: give its jobs files of their own");
        let name = path.rsplit('/').next().unwrap();
        assert!(!["utils.rs", "helpers.rs", "common.rs", "misc.rs"].contains(&name), "src/{path} names no job");
    }
}
