//! The ledger against a model of containerd's rules, under random requests.

use std::collections::BTreeMap;

use proptest::prelude::*;
use redb::{Database, TableDefinition};

use super::*;

/// What the ledger should hold, written down as simply as possible.
#[derive(Debug, Default)]
struct Model {
    rows: BTreeMap<String, Row>,
    last_id: u64,
}

/// How a request fails.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
}

#[derive(Clone, Debug)]
enum Request {
    Create { kind: Kind, key: String, parent: String },
    CommitLazy { name: String, parent: String, chain: ChainId },
    Commit { key: String, name: String, parent: String },
    Remove { key: String },
    Update { key: String, value: String, all: bool },
    Reopen,
}

impl Model {
    fn check_parent(&self, parent: &str) -> Result<(), Refusal> {
        match self.rows.get(parent) {
            _ if parent.is_empty() => Ok(()),
            None => Err(Refusal::NotFound),
            Some(row) if row.kind != Kind::Committed => Err(Refusal::InvalidArgument),
            Some(_) => Ok(()),
        }
    }

    fn add(&mut self, key: &str, kind: Kind, parent: &str, chain: Option<ChainId>, now: Stamp) -> Result<(), Refusal> {
        self.check_parent(parent)?;
        if self.rows.contains_key(key) {
            return Err(Refusal::AlreadyExists);
        }
        self.last_id += 1;
        let (parent, labels) = (parent.to_owned(), BTreeMap::from([("l".to_owned(), key.to_owned())]));
        let row = Row { id: SnapshotId(self.last_id), kind, parent, labels, created: now, updated: now, usage: Usage::default(), chain };
        self.rows.insert(key.to_owned(), row);
        Ok(())
    }

    fn commit(&mut self, key: &str, name: &str, parent: &str, now: Stamp) -> Result<(), Refusal> {
        if self.rows.contains_key(name) {
            return Err(Refusal::AlreadyExists);
        }
        let mut row = self.rows.get(key).ok_or(Refusal::NotFound)?.clone();
        if row.kind != Kind::Active {
            return Err(Refusal::FailedPrecondition);
        }
        if row.parent.is_empty() && !parent.is_empty() {
            // The active snapshot is as good as gone by now.
            let wanted = self.rows.get(parent).filter(|_| parent != key).ok_or(Refusal::NotFound)?;
            if wanted.kind != Kind::Committed {
                return Err(Refusal::FailedPrecondition);
            }
            row.parent = parent.to_owned();
        } else if !parent.is_empty() && parent != row.parent {
            return Err(Refusal::InvalidArgument);
        }
        self.rows.remove(key);
        let usage = Usage { size: 4096, inodes: 1 };
        self.rows.insert(name.to_owned(), Row { kind: Kind::Committed, labels: BTreeMap::new(), created: now, updated: now, usage, ..row });
        Ok(())
    }

    fn remove(&mut self, key: &str) -> Result<(), Refusal> {
        if !self.rows.contains_key(key) {
            return Err(Refusal::NotFound);
        }
        if self.rows.values().any(|row| row.parent == key) {
            return Err(Refusal::FailedPrecondition);
        }
        self.rows.remove(key);
        Ok(())
    }

    fn update(&mut self, key: &str, value: &str, all: bool, now: Stamp) -> Result<(), Refusal> {
        let row = self.rows.get_mut(key).ok_or(Refusal::NotFound)?;
        if all {
            row.labels.clear();
        }
        row.labels.remove("m");
        if !value.is_empty() {
            row.labels.insert("m".to_owned(), value.to_owned());
        }
        row.updated = now;
        Ok(())
    }

    fn lineage(&self, key: &str) -> Lineage {
        let mut lineage = Lineage::default();
        let mut next = &self.rows[key].parent;
        while let Some(row) = self.rows.get(next) {
            if let Some(chain) = row.chain {
                lineage.lower = Some(chain);
                break;
            }
            lineage.uppers.push(row.id);
            next = &row.parent;
        }
        lineage
    }

    fn chains_in_use(&self) -> BTreeSet<ChainId> {
        let users = self.rows.iter().filter(|(_, row)| row.kind != Kind::Committed);
        users.filter_map(|(key, _)| self.lineage(key).lower).collect()
    }
}

fn refusal<T>(result: Result<T, LedgerError>) -> Result<(), Refusal> {
    match result {
        Ok(_) => Ok(()),
        Err(LedgerError::NotFound { .. }) => Err(Refusal::NotFound),
        Err(LedgerError::AlreadyExists { .. }) => Err(Refusal::AlreadyExists),
        Err(LedgerError::FailedPrecondition { .. }) => Err(Refusal::FailedPrecondition),
        Err(LedgerError::InvalidArgument { .. }) => Err(Refusal::InvalidArgument),
        Err(other) => panic!("the ledger itself failed: {other}"),
    }
}

fn chain(number: u8) -> ChainId {
    ChainId(Sha256([number; 32]))
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    // Few names, so that requests meet.
    let name = || prop::sample::select(vec!["a", "b", "c", "k8s.io/1/extract-2 sha256:d", "é/\u{0}/../e"]).prop_map(str::to_owned);
    let parent = move || prop_oneof![2 => Just(String::new()), 5 => name()];
    let kind = prop::sample::select(vec![Kind::Active, Kind::Active, Kind::View, Kind::Committed]);
    let request = prop_oneof![
        4 => (kind, name(), parent()).prop_map(|(kind, key, parent)| match kind {
            Kind::Committed => Request::CommitLazy { name: key, parent, chain: chain(1) },
            kind => Request::Create { kind, key, parent },
        }),
        1 => (name(), parent(), 1..4_u8).prop_map(|(name, parent, number)| Request::CommitLazy { name, parent, chain: chain(number) }),
        3 => (name(), name(), parent()).prop_map(|(key, name, parent)| Request::Commit { key, name, parent }),
        2 => name().prop_map(|key| Request::Remove { key }),
        1 => (name(), "[xy]?", any::<bool>()).prop_map(|(key, value, all)| Request::Update { key, value, all }),
        1 => Just(Request::Reopen),
    ];
    prop::collection::vec(request, 1..40)
}

fn apply(ledger: &Ledger, request: &Request, now: Stamp) -> Result<(), Refusal> {
    match request.clone() {
        Request::Create { kind, key, parent } => {
            let labels = BTreeMap::from([("l".to_owned(), key.clone()), ("empty".to_owned(), String::new())]);
            refusal(ledger.create(NewSnapshot { kind, key, parent, labels }, now, |_, _| Ok(())))
        }
        Request::CommitLazy { name, parent, chain } => {
            let labels = BTreeMap::from([("l".to_owned(), name.clone())]);
            refusal(ledger.commit_lazy(&name, &parent, chain, labels, now))
        }
        Request::Commit { key, name, parent } => refusal(ledger.commit(&key, &name, &parent, BTreeMap::new(), Usage { size: 4096, inodes: 1 }, now)),
        Request::Remove { key } => refusal(ledger.remove(&key, None)),
        Request::Update { key, value, all } => {
            let labels = BTreeMap::from([("m".to_owned(), value)]);
            let paths = if all { vec![] } else { vec!["labels.m".to_owned()] };
            refusal(ledger.update(&key, &labels, &paths, now))
        }
        Request::Reopen => Ok(()),
    }
}

fn apply_to_model(model: &mut Model, request: &Request, now: Stamp) -> Result<(), Refusal> {
    match request {
        Request::Create { kind, key, parent } => model.add(key, *kind, parent, None, now),
        Request::CommitLazy { name, parent, chain } => model.add(name, Kind::Committed, parent, Some(*chain), now),
        Request::Commit { key, name, parent } => model.commit(key, name, parent, now),
        Request::Remove { key } => model.remove(key),
        Request::Update { key, value, all } => model.update(key, value, *all, now),
        Request::Reopen => Ok(()),
    }
}

/// Hundreds of commits with a real fsync each would take a minute.
fn memory_dir() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("a temporary directory")
}

proptest! {
    #[test]
    fn the_ledger_keeps_containerds_rules(requests in requests()) {
        let dir = memory_dir();
        let path = dir.path().join("ledger.redb");
        let mut ledger = Ledger::open(&path).expect("opened");
        let mut model = Model::default();
        for (step, request) in requests.iter().enumerate() {
            let now = Stamp { seconds: 1_000 + i64::try_from(step).expect("few steps"), nanos: 5 };
            if matches!(request, Request::Reopen) {
                drop(ledger);
                ledger = Ledger::open(&path).expect("opened again");
            }
            prop_assert_eq!(apply(&ledger, request, now), apply_to_model(&mut model, request, now), "{:?}", request);
            let rows: BTreeMap<_, _> = ledger.list().expect("listed").into_iter().collect();
            prop_assert_eq!(&rows, &model.rows);
            for key in model.rows.keys() {
                let (_, lineage) = ledger.get_with_lineage(key).expect("found");
                prop_assert_eq!(lineage, model.lineage(key));
            }
            let in_use = model.chains_in_use();
            prop_assert_eq!(&ledger.chains_in_use().expect("counted"), &in_use);
            for number in 0..5 {
                prop_assert_eq!(ledger.has_users(&chain(number)).expect("counted"), in_use.contains(&chain(number)));
            }
        }
    }
}

fn open_error_of(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("ledger.redb");
    std::fs::write(&path, bytes).expect("written");
    let error = Ledger::open(&path).expect_err("refused");
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    error.to_string()
}

#[test]
fn what_no_slipway_wrote_is_refused_by_name() {
    for bytes in [&b"not a database"[..], &[0; 4096], &[0xff; 100_000]] {
        assert!(open_error_of(bytes).contains("damaged"), "{}", open_error_of(bytes));
    }
}

#[test]
fn a_file_cut_short_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("ledger.redb");
    drop(Ledger::open(&path).expect("made"));
    let whole = std::fs::read(&path).expect("read");
    for length in [1, 64, 4096, whole.len() / 2, whole.len() - 1] {
        open_error_of(&whole[..length]);
    }
}

#[test]
fn a_ledger_of_a_newer_version_is_left_alone() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("ledger.redb");
    drop(Ledger::open(&path).expect("made"));
    let database = Database::create(&path).expect("opened");
    let transaction = database.begin_write().expect("begun");
    let numbers: TableDefinition<&str, u64> = TableDefinition::new("numbers");
    transaction.open_table(numbers).expect("table").insert("format", FORMAT + 1).expect("written");
    transaction.commit().expect("committed");
    drop(database);
    let error = Ledger::open(&path).expect_err("refused");
    assert!(matches!(error, LedgerError::Newer { found, .. } if found == FORMAT + 1), "{error}");
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
}

#[test]
fn two_processes_never_share_a_ledger() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("ledger.redb");
    let _first = Ledger::open(&path).expect("made");
    assert!(matches!(Ledger::open(&path), Err(LedgerError::InUse { .. })));
}

#[test]
fn a_number_is_never_given_twice() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ledger = Ledger::open(&dir.path().join("ledger.redb")).expect("made");
    let mut ids = BTreeSet::new();
    for _ in 0..3 {
        let new = NewSnapshot { kind: Kind::Active, key: "k".into(), parent: String::new(), labels: BTreeMap::new() };
        let (row, _) = ledger.create(new, Stamp::now(), |_, _| Ok(())).expect("created");
        assert!(ids.insert(row.id));
        assert_eq!(ledger.remove("k", Some(row.id)).expect("removed").id, row.id);
    }
}

#[test]
fn a_directory_that_cannot_be_made_leaves_no_row() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ledger = Ledger::open(&dir.path().join("ledger.redb")).expect("made");
    let new = NewSnapshot { kind: Kind::Active, key: "k".into(), parent: String::new(), labels: BTreeMap::new() };
    let error = ledger.create(new, Stamp::now(), |_, _| Err(io::Error::other("disk full"))).expect_err("refused");
    assert!(matches!(error, LedgerError::Directory { .. }), "{error}");
    assert!(ledger.list().expect("listed").is_empty());
}
