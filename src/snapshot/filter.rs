//! containerd's filter syntax, as far as listing snapshots needs it.
//!
//! `<selector>[,<selector>…]`, all of which must hold, a selector being `<path>` (has it), `<path>==<value>`, `<path>!=<value>` or
//! `<path>~=<regex>`; a path is names joined by dots, a name or a value may be quoted as in Go (`pkg/filters` of containerd).
//! containerd filters once more what it gets, so what is not understood here (regular expressions, mistakes) lets everything through.

use super::ledger::{Kind, Row};

/// Several filters: a snapshot is listed if it passes any, or if there are none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filters(Vec<Filter>);

/// Selectors that must all hold.
type Filter = Vec<Selector>;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    /// A regular expression, which is not looked at.
    Anything,
}

impl Filters {
    /// Reads the filters of a request.
    pub fn parse(texts: &[String]) -> Filters {
        // What cannot be read becomes a filter without selectors, which everything passes.
        Filters(texts.iter().map(|text| Parser { rest: text }.filter().unwrap_or_default()).collect())
    }

    /// Whether the snapshot `name` is asked for.
    pub fn pass(&self, name: &str, row: &Row) -> bool {
        self.0.is_empty() || self.0.iter().any(|filter| filter.iter().all(|selector| selector.holds(name, row)))
    }
}

impl Selector {
    fn holds(&self, name: &str, row: &Row) -> bool {
        let value = field(&self.path, name, row);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.as_ref() == Some(wanted),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != *unwanted,
            Test::Anything => true,
        }
    }
}

/// The value a path names, `None` if the snapshot has nothing of that name.
fn field(path: &[String], name: &str, row: &Row) -> Option<String> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "name" => Some(name.to_owned()),
        "parent" => Some(row.parent.clone()),
        "kind" => Some(kind_name(row.kind).to_owned()),
        "labels" => row.labels.get(&rest.join(".")).cloned(),
        _ => None,
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::View => "view",
        Kind::Active => "active",
        Kind::Committed => "committed",
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl Parser<'_> {
    /// The whole text as one filter; `None` if it follows other rules.
    fn filter(mut self) -> Option<Filter> {
        let mut selectors = Filter::new();
        if self.rest.is_empty() {
            return Some(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            if self.rest.is_empty() {
                return Some(selectors);
            }
            self.eat(",")?;
        }
    }

    fn selector(&mut self) -> Option<Selector> {
        let mut path = vec![self.name()?];
        while self.eat(".").is_some() {
            path.push(self.name()?);
        }
        let test = if self.eat("==").is_some() {
            Test::Equal(self.value()?)
        } else if self.eat("!=").is_some() {
            Test::NotEqual(self.value()?)
        } else if self.eat("~=").is_some() {
            self.value()?;
            Test::Anything
        } else {
            Test::Present
        };
        Some(Selector { path, test })
    }

    fn name(&mut self) -> Option<String> {
        if self.rest.starts_with('"') {
            return self.quoted();
        }
        let name = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        (!name.is_empty()).then_some(name)
    }

    fn value(&mut self) -> Option<String> {
        if self.rest.starts_with('"') {
            return self.quoted();
        }
        // Regular expressions may also be quoted by slashes or bars and then hold commas: not understood, like any other oddity.
        if self.rest.starts_with(['/', '|']) {
            return None;
        }
        Some(self.take_while(|c| c != ',' && !c.is_whitespace()))
    }

    /// A Go string literal in double quotes. Escapes by number are not understood.
    fn quoted(&mut self) -> Option<String> {
        let mut text = String::new();
        let mut chars = self.rest.strip_prefix('"')?.chars();
        loop {
            match chars.next()? {
                '"' => break,
                '\\' => text.push(match chars.next()? {
                    same @ ('"' | '\\') => same,
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    _ => return None,
                }),
                other => text.push(other),
            }
        }
        self.rest = chars.as_str();
        Some(text)
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken.to_owned()
    }

    fn eat(&mut self, prefix: &str) -> Option<()> {
        self.rest = self.rest.strip_prefix(prefix)?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::ledger::{SnapshotId, Stamp, Usage};
    use proptest::prelude::*;

    fn row(kind: Kind, parent: &str, labels: &[(&str, &str)]) -> Row {
        let now = Stamp { seconds: 1, nanos: 0 };
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Row { id: SnapshotId(1), kind, parent: parent.to_owned(), labels, created: now, updated: now, usage: Usage::default(), chain: None }
    }

    /// Names of the snapshots that pass, out of the ones containerd's own suite uses (`core/snapshots/testsuite`, `checkWalk`).
    fn check(filters: &[&str], expected: &[&str]) {
        let root = ("containerd.io/gc.root", "check-walk");
        let all = [
            ("a-np", row(Kind::Active, "", &[root])),
            ("p", row(Kind::Committed, "", &[root])),
            ("a", row(Kind::Active, "p", &[root])),
            ("v", row(Kind::View, "p", &[root])),
            ("p-wl", row(Kind::Committed, "", &[root, ("l", "1")])),
            ("a-wl", row(Kind::Active, "p-wl", &[root, ("l", "2")])),
            ("v-wl", row(Kind::View, "p-wl", &[root, ("l", "3")])),
            ("a-np-wl", row(Kind::Active, "", &[("l", "2")])),
        ];
        let filters = Filters::parse(&filters.iter().map(|&text| text.to_owned()).collect::<Vec<_>>());
        let passed: Vec<_> = all.iter().filter(|(name, row)| filters.pass(name, row)).map(|(name, _)| *name).collect();
        assert_eq!(passed, expected, "{filters:?}");
    }

    #[test]
    fn filters_select_as_containerds_do() {
        check(&[], &["a-np", "p", "a", "v", "p-wl", "a-wl", "v-wl", "a-np-wl"]);
        check(&[""], &["a-np", "p", "a", "v", "p-wl", "a-wl", "v-wl", "a-np-wl"]);
        check(&[r#"labels."containerd.io/gc.root"==check-walk"#], &["a-np", "p", "a", "v", "p-wl", "a-wl", "v-wl"]);
        check(&[r#"kind==active,labels."containerd.io/gc.root"==check-walk"#], &["a-np", "a", "a-wl"]);
        check(&["kind==view"], &["v", "v-wl"]);
        check(&["kind==committed"], &["p", "p-wl"]);
        check(&["name==p", "name==a-np-wl"], &["p", "a-np-wl"]);
        check(&["name==a-wl,labels.l"], &["a-wl"]);
        check(&["parent==p"], &["a", "v"]);
        check(&[r#"parent=="""#], &["a-np", "p", "p-wl", "a-np-wl"]);
        check(&[r#"parent!="""#], &["a", "v", "a-wl", "v-wl"]);
        check(&["labels.l==2"], &["a-wl", "a-np-wl"]);
        check(&["labels.l!=2"], &["a-np", "p", "a", "v", "p-wl", "v-wl"]);
        check(&["nothing"], &[]);
        check(&["nothing==x"], &[]);
    }

    #[test]
    fn the_handshake_filter_finds_a_chain_by_label_and_parent() {
        let chain = "sha256:00ff";
        let parent = "slipway/00/aa bb";
        let filters = Filters::parse(&[format!(r#"labels."containerd.io/snapshot.ref"=={chain},parent=="{parent}""#)]);
        let labels = [("containerd.io/snapshot.ref", chain)];
        assert!(filters.pass("x", &row(Kind::Committed, parent, &labels)));
        assert!(!filters.pass("x", &row(Kind::Committed, "", &labels)));
        assert!(!filters.pass("x", &row(Kind::Committed, parent, &[])));
    }

    #[test]
    fn what_is_not_understood_lets_everything_through() {
        let everything = ["a-np", "p", "a", "v", "p-wl", "a-wl", "v-wl", "a-np-wl"];
        for text in ["name~=x", "name~=/a,b/", "name==|x|", "==x", "name==a b", r#"name=="open"#, "a..b", ",", "name,", r#"name=="\x41""#] {
            check(&[text], &everything);
        }
        check(&["name~=x,kind==view"], &["v", "v-wl"]);
    }

    proptest! {
        #[test]
        fn no_text_panics_and_quoted_values_come_back(text in ".*", value in "[ -~]*") {
            let _ = Filters::parse(&[text]);
            let quoted = value.replace('\\', r"\\").replace('"', "\\\"");
            let filters = Filters::parse(&[format!(r#"name=="{quoted}""#)]);
            prop_assert!(filters.pass(&value, &row(Kind::View, "", &[])));
            let other = value.clone() + ".";
            prop_assert!(!filters.pass(&other, &row(Kind::View, "", &[])));
        }
    }
}
