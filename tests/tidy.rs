//! The house rules that a program can check. Each test collects every violation before it fails.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

use std::fs;
use std::path::{Path, PathBuf};

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 70;

/// A text file of the repository.
struct Source {
    /// Relative to the repository's root, with forward slashes.
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// The part that is compiled into the product: a source file up to its test module.
    fn product_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().take_while(|line| *line != "#[cfg(test)]").enumerate().map(|(number, line)| (number + 1, line))
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every text file of the repository, built and downloaded things left out.
fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    let mut pending = vec![root()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).expect("a directory of the repository can be listed") {
            let entry = entry.expect("a directory of the repository can be listed");
            let (path, name) = (entry.path(), entry.file_name());
            if entry.file_type().expect("its type is known").is_dir() {
                if !["target", ".git", "corpus", "artifacts"].iter().any(|skipped| name == *skipped) {
                    pending.push(path);
                }
            } else if name == ".git" {
                // A linked worktree's pointer to its repository.
            } else if let Ok(text) = fs::read_to_string(&path) {
                found.push(Source { path: relative(&path), text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(found.iter().any(Source::is_rust), "the repository's sources were not found");
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).expect("it lies in the repository").to_string_lossy().into_owned()
}

fn fail_on(rule: &str, violations: Vec<String>) {
    assert!(violations.is_empty(), "{rule}:\n  {}", violations.join("\n  "));
}

/// Files without product code: tests, benchmarks, and modules declared under `#[cfg(test)]`.
fn is_test_file(path: &str, sources: &[Source]) -> bool {
    let module = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".rs");
    let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir);
    let declares = |source: &Source| {
        let parent = [format!("{dir}/mod.rs"), format!("{dir}/lib.rs"), format!("{dir}/main.rs"), format!("{dir}.rs")].contains(&source.path);
        parent && ["mod", "pub(crate) mod"].iter().any(|word| source.text.contains(&format!("#[cfg(test)]\n{word} {module};")))
    };
    ["tests/", "benches/"].iter().any(|dir| path.starts_with(dir) || path.contains(&format!("/{dir}"))) || sources.iter().any(declares)
}

/// `path:line` for every product line of a Rust file for which `is_bad` holds.
fn product_lines_where(is_bad: impl Fn(&Source, &str) -> bool) -> Vec<String> {
    let sources = sources();
    let mut found = Vec::new();
    for source in sources.iter().filter(|source| source.is_rust() && !is_test_file(&source.path, &sources)) {
        found.extend(
            source
                .product_lines()
                .filter(|(_, line)| is_bad(source, line))
                .map(|(number, line)| format!("{}:{number}: {}", source.path, line.trim())),
        );
    }
    found
}

/// A line without its comment. Good enough for house rules: nobody here hides code behind `//` in a string.
fn code(line: &str) -> &str {
    line.split_once("//").map_or(line, |(code, _)| code)
}

/// Whether `word` stands in `line` as a word of its own.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(word).any(|(at, _)| !is_part(line[..at].chars().next_back()) && !is_part(line[at + word.len()..].chars().next()))
}

#[test]
fn every_rust_file_opens_with_a_sentence_about_itself() {
    let opens = |text: &str| text.lines().next().is_some_and(|line| line.starts_with("//! ") && line.len() > 15);
    let bad = sources().into_iter().filter(|source| source.is_rust() && !opens(&source.text)).map(|source| source.path).collect();
    fail_on("the first line must be a `//!` sentence saying what the file is for", bad);
}

#[test]
fn files_stay_small() {
    let too_long = |source: &Source| source.is_rust() && source.text.lines().count() >= MAX_FILE_LINES;
    let bad =
        sources().iter().filter(|source| too_long(source)).map(|source| format!("{}: {} lines", source.path, source.text.lines().count())).collect();
    fail_on("a file this long does more than one thing", bad);
}

#[test]
fn functions_stay_small() {
    let mut bad = Vec::new();
    for source in sources().iter().filter(|source| source.is_rust()) {
        bad.extend(long_functions(&source.text).into_iter().map(|(line, length)| format!("{}:{line}: {length} lines", source.path)));
    }
    fail_on("a function this long does more than one thing", bad);
}

/// First line and length of each function that is too long. Relies on rustfmt: a body ends at the first `}` as far to the left as its `fn`.
fn long_functions(text: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let is_function = line.trim_start().split(' ').take_while(|word| !word.starts_with("//")).take(5).any(|word| word == "fn");
        if !is_function || line.ends_with(';') || line.trim_end().ends_with('}') {
            continue;
        }
        let end = format!("{}}}", &line[..indent]);
        if let Some(length) = lines[start..].iter().position(|line| *line == end).map(|last| last + 1).filter(|length| *length >= MAX_FUNCTION_LINES)
        {
            found.push((start + 1, length));
        }
    }
    found
}

#[test]
fn names_say_what_is_inside() {
    const VAGUE: [&str; 10] = ["util", "utils", "common", "manager", "mgr", "helper", "helpers", "misc", "factory", "shared"];
    let is_vague = |path: &str| path.split(['/', '.', '_', '-']).any(|word| VAGUE.contains(&word));
    let bad = sources().into_iter().map(|source| source.path).filter(|path| is_vague(path)).collect();
    fail_on("a path must be named for what it holds", bad);
}

#[test]
fn unsafe_code_lives_in_uapi_and_says_why_it_is_sound() {
    let bad = product_lines_where(|source, line| !source.path.starts_with("uapi/") && has_word(code(line), "unsafe"));
    fail_on("unsafe is for uapi/ only", bad);

    // How far above its `unsafe` a SAFETY comment may begin: a few lines of reasons, or the first of several blocks in one expression.
    const REACH: usize = 8;
    let mut bad = Vec::new();
    for source in sources().iter().filter(|source| source.is_rust() && source.path.starts_with("uapi/")) {
        let lines: Vec<&str> = source.text.lines().collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| code(line).contains("unsafe {") || code(line).contains("unsafe impl")) {
            if !lines[at.saturating_sub(REACH)..=at].iter().any(|above| above.contains("// SAFETY:")) {
                bad.push(format!("{}:{}: {}", source.path, at + 1, line.trim()));
            }
        }
    }
    fail_on("every unsafe block needs a `// SAFETY:` comment", bad);
}

#[test]
fn modules_use_only_what_is_listed_above_them() {
    let text = fs::read_to_string(root().join("src/lib.rs")).expect("the library has a root");
    let order: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert!(order.len() > 5, "src/lib.rs lists the modules, low to high, one `pub mod` a line");
    let rank = |name: &str| order.iter().position(|module| *module == name);
    let bad = product_lines_where(|source, line| {
        let Some(own) = source.path.strip_prefix("src/").and_then(|path| path.split(['/', '.']).next()).and_then(rank) else { return false };
        let used = code(line).split("crate::").skip(1).map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default());
        used.filter_map(rank).any(|used| used > own)
    });
    fail_on("src/lib.rs lists modules low to high; a module uses only those above it in that list", bad);
}

#[test]
fn backends_do_not_know_each_other() {
    const BACKENDS: [&str; 3] = ["fake", "fuse_blob", "fscache"];
    let bad = product_lines_where(|source, line| {
        let Some(own) = source.path.strip_prefix("src/kernel/").and_then(|path| path.split(['/', '.']).next()).filter(|name| BACKENDS.contains(name))
        else {
            return false;
        };
        BACKENDS.iter().any(|other| *other != own && (line.contains(&format!("super::{other}")) || line.contains(&format!("kernel::{other}"))))
    });
    fail_on("a backend can be deleted the day its kernel interface is: no other may import it", bad);
}

#[test]
fn the_product_never_unwraps() {
    fail_on("outside tests: handle it, or `expect(\"the invariant\")`", product_lines_where(|_, line| code(line).contains(".unwrap()")));
}

#[test]
fn nothing_is_left_for_later() {
    // In pieces, so that this file does not find itself.
    let marks = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("#[", "ignore"),
        concat!("dbg", "!("),
        concat!("FIX", "ME"),
        concat!("TO", "DO"),
    ];
    let mut bad = Vec::new();
    for source in sources() {
        for (number, line) in source.text.lines().enumerate().filter(|(_, line)| marks.iter().any(|mark| line.contains(mark))) {
            bad.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
        }
    }
    fail_on("finish it, or write an issue", bad);
}

#[test]
fn only_programs_use_errors_without_a_type() {
    // Test gear, demo and converter are programs, or parts of one.
    let is_library = |path: &str| ["src/", "erofs/", "uapi/"].iter().any(|dir| path.starts_with(dir)) && !path.starts_with("src/bin/");
    fail_on(
        "a library's errors are types: what can the caller do?",
        product_lines_where(|source, line| is_library(&source.path) && has_word(code(line), "anyhow")),
    );
}

#[test]
fn the_repository_stands_alone() {
    // Paths of one machine, and hosts of package registries: neither belongs into a file of the project. In pieces, as above.
    let words = [
        concat!("/wo", "rk/"),
        concat!("/tmp/", "wt/"),
        concat!("../sha", "red"),
        concat!("/ro", "ot/"),
        concat!("py", "pi.org"),
        concat!("deb.deb", "ian.org"),
    ];
    // `$dir` + `/name` is no path of a machine.
    let begins = |line: &str, at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '}');
    let names = |line: &str| words.iter().any(|word| line.match_indices(word).any(|(at, _)| begins(line, at)));
    let mut bad = Vec::new();
    for source in sources().iter().filter(|source| source.path != "Cargo.lock") {
        for (number, line) in source.text.lines().enumerate().filter(|(_, line)| names(line)) {
            bad.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
        }
    }
    fail_on("nothing here may depend on one machine or name a registry's host", bad);
}

#[test]
fn versions_live_in_the_root_manifest() {
    let mut bad = Vec::new();
    for source in sources().iter().filter(|source| source.path.ends_with("/Cargo.toml") && !source.path.starts_with("tools/fuzz/")) {
        let mut section = String::new();
        for (number, line) in source.text.lines().enumerate() {
            if line.starts_with('[') {
                section = line.to_owned();
            } else if section.contains("dependencies") && line.contains('=') && !line.contains("workspace = true") {
                bad.push(format!("{}:{}: {line}", source.path, number + 1));
            }
        }
    }
    fail_on("members say `workspace = true`", bad);
}

#[test]
fn the_checks_see_what_they_look_for() {
    let body = "    let x = 1;\n".repeat(MAX_FUNCTION_LINES);
    assert_eq!(long_functions(&format!("pub(crate) async fn long() {{\n{body}}}\n")), [(1, MAX_FUNCTION_LINES + 2)]);
    assert_eq!(long_functions(&format!("mod x {{\n    fn short() {{\n    }}\n{body}}}\n")), []);
    assert_eq!(long_functions(&format!("trait T {{\n    fn none(&self);\n}}\n{body}}}\n")), []);
    assert!(has_word("unsafe { x }", "unsafe") && !has_word("#![deny(unsafe_code)]", "unsafe"));
    assert_eq!(code("let x = 1; // .unwrap()"), "let x = 1; ");
}
