//! States of a pack's units, and who fills which: one fill per unit however many ask.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use uapi::fuse::Errno;

use super::presence::{Presence, Saved};
use super::{Pack, UnitIndex, Verified};

/// What an asker needs before it can answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// The bytes themselves, as soon as they are verified.
    Bytes,
    /// That the bytes are in the local file, from where the kernel reads them itself.
    Stored,
}

const ABSENT: u8 = 0;
const UNCHECKED: u8 = 1;
const FILLING: u8 = 2;
const READY: u8 = 3;
const STATE: u8 = 0b11;
/// The next window of a sequential reader should be fetched when this unit is touched.
const MARKED: u8 = 0b100;

/// States of all units of one pack.
#[derive(Debug)]
pub struct Units {
    states: Box<[AtomicU8]>,
    /// Units being filled. Every change into or out of Filling is made under this lock; it is held for a map operation, never across I/O.
    flights: Mutex<HashMap<UnitIndex, Flight>>,
    /// Something became Ready, or ceased to be, since the last saved map.
    changed: AtomicBool,
    /// How often a sync failed. Changed and read under `flights`.
    losses: AtomicU64,
    /// What may be on disk as the pack's map. Changed by whoever saves, looked at before a direct mount.
    maps: Mutex<Maps>,
    /// Held across one save of the map, so that saves do not overtake each other.
    saving: tokio::sync::Mutex<()>,
}

/// Maps of one pack.
#[derive(Debug)]
struct Maps {
    /// The last saved one.
    last: Saved,
    /// The one given out to be saved.
    begun: Option<Presence>,
    /// Units of those whose writing failed since then: whether they are on disk is not known before another has been saved.
    failed: Option<Presence>,
}

type Outcome = Result<Verified, Errno>;

/// One unit on its way.
#[derive(Debug, Default)]
struct Flight {
    verified: Option<Verified>,
    bytes: Vec<oneshot::Sender<Outcome>>,
    stored: Vec<oneshot::Sender<Outcome>>,
}

/// What [`Pack::claim`] found.
#[derive(Debug)]
pub enum Claim {
    /// The unit's bytes are in the local file, verified.
    Ready,
    /// The unit is on its way.
    Wait(Wait),
    /// It is the caller's to fill. To get its bytes like everyone else, claim it again and wait.
    Fill(Fill),
}

/// The end of someone's fill.
#[derive(Debug)]
pub struct Wait(oneshot::Receiver<Outcome>);

/// A fill ended without a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfilled {
    /// It was tried and did not work; the asker gets this error.
    Failed(Errno),
    /// The filler went away. Claim again.
    Dropped,
}

impl Wait {
    /// Waits for the unit.
    pub async fn done(self) -> Result<Verified, Unfilled> {
        match self.0.await {
            Ok(outcome) => outcome.map_err(Unfilled::Failed),
            Err(_) => Err(Unfilled::Dropped),
        }
    }
}

/// The right and duty to fill one unit. Dropping it unfinished puts the unit back to what it was and frees those who wait.
#[derive(Debug)]
pub struct Fill {
    pack: Arc<Pack>,
    unit: UnitIndex,
    cached: bool,
    /// Of the pack, when the fill began.
    losses: u64,
    ended: bool,
}

impl Units {
    /// `count` units; those in `saved` are trusted or have to be checked.
    pub fn new(count: u32, saved: &Saved, trusted: bool) -> Units {
        let stored = if trusted { READY } else { UNCHECKED };
        let state = |unit| AtomicU8::new(if saved.present.has(UnitIndex(unit)) { stored } else { ABSENT });
        Units {
            states: (0..count).map(state).collect(),
            flights: Mutex::default(),
            changed: AtomicBool::new(false),
            losses: AtomicU64::new(0),
            maps: Mutex::new(Maps { last: saved.clone(), begun: None, failed: None }),
            saving: tokio::sync::Mutex::default(),
        }
    }

    /// These units were verified in this process when the pack was open before; those that are still stored are Ready. For a pack that nobody
    /// has yet.
    pub fn trust(&self, verified: &Presence) {
        let stored = self.all(|unit, state| state == UNCHECKED && verified.has(unit));
        (0..self.count()).map(UnitIndex).filter(|unit| stored.has(*unit)).for_each(|unit| self.set(unit, READY));
    }

    /// Whether the unit's bytes can be read from the local file as they are.
    pub fn is_ready(&self, unit: UnitIndex) -> bool {
        // Acquire: what was written to the file before the unit became Ready is seen by whoever sees Ready.
        self.state(unit).load(Ordering::Acquire) & STATE == READY
    }

    /// Marks a unit: touching it is the sign to fetch further.
    pub fn mark(&self, unit: UnitIndex) {
        self.state(unit).fetch_or(MARKED, Ordering::Relaxed);
    }

    /// Whether the unit is marked; the first to ask takes the mark away.
    pub fn take_mark(&self, unit: UnitIndex) -> bool {
        let state = self.state(unit);
        state.load(Ordering::Relaxed) & MARKED != 0 && state.fetch_and(!MARKED, Ordering::Relaxed) & MARKED != 0
    }

    /// Whether there is a map to save.
    pub fn has_changed(&self) -> bool {
        self.changed.load(Ordering::Relaxed)
    }

    /// The right to save the map: one at a time.
    pub async fn saving(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.saving.lock().await
    }

    /// Whether the map on disk says, or may say by now, that this unit is stored.
    pub fn is_saved(&self, unit: UnitIndex) -> bool {
        let maps = self.maps();
        maps.last.present.has(unit) || [&maps.begun, &maps.failed].into_iter().flatten().any(|map| map.has(unit))
    }

    /// The map to save next, if units were stored or lost since the last call: after the data it stands for is durable, write it and call
    /// [`Units::saved`], or else [`Units::not_saved`].
    pub fn to_save(&self) -> Option<Saved> {
        // Acquire pairs with the Release of whoever raised the flag: their unit is in the snapshot.
        if !self.changed.swap(false, Ordering::Acquire) {
            return None;
        }
        // Locked until the map counts as begun: a unit in it may be lost and filled again right now, and whoever fills asks `is_saved`.
        let mut maps = self.maps();
        let present = self.all(|_, state| matches!(state, READY | UNCHECKED));
        if let Some(begun) = maps.begun.take() {
            maps.failed.get_or_insert_with(|| Presence::empty(self.count())).add(&begun);
        }
        // A unit was checked, and is as it was.
        if present == maps.last.present && maps.failed.is_none() {
            return None;
        }
        maps.begun = Some(present.clone());
        Some(Saved { generation: maps.last.generation + 1, present })
    }

    /// This map is durable, and so is the data it stands for.
    pub fn saved(&self, map: Saved) {
        *self.maps() = Maps { last: map, begun: None, failed: None };
    }

    /// The map could not be saved; try again later.
    pub fn not_saved(&self) {
        self.changed.store(true, Ordering::Release);
    }

    /// Whether every unit is stored, known to be durable and verified in this process: what an earlier one stored may have rotted since.
    pub fn all_durable(&self) -> bool {
        self.durable().count() as usize == self.states.len()
    }

    /// The units that are stored, known to be durable and verified in this process.
    pub fn durable(&self) -> Presence {
        let maps = self.maps();
        self.all(|unit, state| state == READY && maps.last.present.has(unit))
    }

    /// The local file does not give the unit's bytes any more: it is Absent from now on.
    pub fn lose(&self, unit: UnitIndex) {
        let _flights = self.flights();
        if self.is_ready(unit) {
            self.set(unit, ABSENT);
            self.not_saved();
        }
    }

    /// A sync failed: what was written since the last saved map may be gone from the disk, and will be gone from memory sometime. The kernel
    /// says so once only, so the next sync's success means nothing for these units: they are Absent from now on.
    pub fn lose_unsaved(&self) {
        let _flights = self.flights();
        // Units being filled may have been written already: see `Fill::end`.
        self.losses.fetch_add(1, Ordering::Relaxed);
        let unsaved = {
            let mut maps = self.maps();
            // Its writing never began.
            maps.begun = None;
            self.all(|unit, state| state == READY && !maps.last.present.has(unit))
        };
        (0..self.count()).map(UnitIndex).filter(|unit| unsaved.has(*unit)).for_each(|unit| self.set(unit, ABSENT));
        self.not_saved();
    }

    fn count(&self) -> u32 {
        u32::try_from(self.states.len()).expect("units are counted in u32")
    }

    /// The units for which `wanted` holds, given their state.
    fn all(&self, wanted: impl Fn(UnitIndex, u8) -> bool) -> Presence {
        let mut all = Presence::empty(self.count());
        for unit in (0..self.count()).map(UnitIndex) {
            if wanted(unit, self.state(unit).load(Ordering::Acquire) & STATE) {
                all.insert(unit);
            }
        }
        all
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self, unit: UnitIndex) -> &AtomicU8 {
        &self.states[unit.0 as usize]
    }

    /// Replaces the state and leaves the mark.
    fn set(&self, unit: UnitIndex, to: u8) {
        let _ = self.state(unit).fetch_update(Ordering::Release, Ordering::Relaxed, |old| Some(old & !STATE | to));
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<UnitIndex, Flight>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pack {
    /// Who has this unit?
    pub fn claim(self: &Arc<Pack>, unit: UnitIndex, wants: Wants) -> Claim {
        if self.units.is_ready(unit) {
            return Claim::Ready;
        }
        let mut flights = self.units.flights();
        let state = self.units.state(unit).load(Ordering::Acquire) & STATE;
        match state {
            READY => Claim::Ready,
            FILLING => {
                let (tx, rx) = oneshot::channel();
                let flight = flights.entry(unit).or_default();
                match (&flight.verified, wants) {
                    (Some(verified), Wants::Bytes) => drop(tx.send(Ok(verified.clone()))),
                    (None, Wants::Bytes) => flight.bytes.push(tx),
                    (_, Wants::Stored) => flight.stored.push(tx),
                }
                Claim::Wait(Wait(rx))
            }
            _ => Claim::Fill(self.begin(unit, state, &mut flights)),
        }
    }

    /// The unit's fill, if it is in nobody's hands and not stored.
    pub fn claim_absent(self: &Arc<Pack>, unit: UnitIndex) -> Option<Fill> {
        if self.units.state(unit).load(Ordering::Relaxed) & STATE != ABSENT {
            return None;
        }
        let mut flights = self.units.flights();
        let state = self.units.state(unit).load(Ordering::Acquire) & STATE;
        (state == ABSENT).then(|| self.begin(unit, state, &mut flights))
    }

    fn begin(self: &Arc<Pack>, unit: UnitIndex, state: u8, flights: &mut HashMap<UnitIndex, Flight>) -> Fill {
        self.units.set(unit, FILLING);
        flights.insert(unit, Flight::default());
        let losses = self.units.losses.load(Ordering::Relaxed);
        Fill { pack: Arc::clone(self), unit, cached: state == UNCHECKED, losses, ended: false }
    }
}

impl Fill {
    /// The unit to fill.
    pub fn unit(&self) -> UnitIndex {
        self.unit
    }

    /// Its pack.
    pub fn pack(&self) -> &Arc<Pack> {
        &self.pack
    }

    /// Whether an earlier process stored the unit: its bytes may be in the local file and right.
    pub fn is_cached(&self) -> bool {
        self.cached
    }

    /// Gives the bytes to everyone who wants bytes, now and until the fill ends.
    pub fn verified(&self, verified: &Verified) {
        debug_assert_eq!(verified.unit(), self.unit);
        let waiting = {
            let mut flights = self.pack.units.flights();
            let flight = flights.entry(self.unit).or_default();
            flight.verified = Some(verified.clone());
            std::mem::take(&mut flight.bytes)
        };
        for tx in waiting {
            // An asker that gave up does not matter.
            let _ = tx.send(Ok(verified.clone()));
        }
    }

    /// The write of the unit to the local file has returned, or what an earlier process wrote is right: the unit is Ready. (Unless a sync
    /// failed since the fill began: then the write may be lost, and those who wait claim it again.)
    pub fn stored(mut self, verified: Verified) {
        self.end(READY, Some(Ok(verified)));
    }

    /// The bytes that an earlier process stored are not the unit's; they no longer count.
    pub fn not_cached(&mut self) {
        self.cached = false;
        self.pack.units.not_saved();
    }

    /// The fill did not work. Those who wait get the error; the next asker tries anew.
    pub fn failed(mut self, errno: Errno) {
        self.end(self.unfilled(), Some(Err(errno)));
    }

    /// The state of a unit whose fill came to nothing.
    fn unfilled(&self) -> u8 {
        if self.cached { UNCHECKED } else { ABSENT }
    }

    fn end(&mut self, state: u8, outcome: Option<Outcome>) {
        self.ended = true;
        let units = &self.pack.units;
        let (flight, lost) = {
            let mut flights = units.flights();
            let lost = state == READY && !self.cached && units.losses.load(Ordering::Relaxed) != self.losses;
            units.set(self.unit, if lost { ABSENT } else { state });
            (flights.remove(&self.unit).unwrap_or_default(), lost)
        };
        if state != ABSENT {
            // After the state, so that whoever takes the flag sees the unit. Also if it was stored before: a map saved meanwhile lacks it.
            units.not_saved();
        }
        let Some(outcome) = outcome.filter(|_| !lost) else { return };
        for tx in flight.bytes.into_iter().chain(flight.stored) {
            // An asker that gave up does not matter.
            let _ = tx.send(outcome.clone());
        }
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        if !self.ended {
            self.end(self.unfilled(), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use uapi::buffer::Buffer;

    use super::*;
    use crate::cache::fake::Sample;

    const UNIT: UnitIndex = UnitIndex(1);

    fn pack() -> (Sample, Arc<Pack>) {
        let sample = Sample::mixed(1, 3 * 65_536);
        let pack = sample.pack();
        (sample, pack)
    }

    fn verified(sample: &Sample) -> Verified {
        let mut bytes = Buffer::new(65_536);
        bytes.copy_from_slice(&sample.bytes[65_536..2 * 65_536]);
        Verified::check(sample.pack().table(), UNIT, bytes).expect("the unit's own bytes")
    }

    fn fill(pack: &Arc<Pack>) -> Fill {
        match pack.claim(UNIT, Wants::Bytes) {
            Claim::Fill(fill) => fill,
            other => panic!("{other:?}"),
        }
    }

    fn wait(pack: &Arc<Pack>, wants: Wants) -> Wait {
        match pack.claim(UNIT, wants) {
            Claim::Wait(wait) => wait,
            other => panic!("{other:?}"),
        }
    }

    /// What a wait has come to: `None` if it has not ended.
    fn outcome(wait: Wait) -> Option<Result<(), Unfilled>> {
        wait.done().now_or_never().map(|outcome| outcome.map(drop))
    }

    #[test]
    fn bytes_come_when_verified_and_the_unit_is_ready_when_stored() {
        let (sample, pack) = pack();
        let fill = fill(&pack);
        assert!(!fill.is_cached() && pack.claim_absent(UNIT).is_none());
        let (early, early_stored) = (wait(&pack, Wants::Bytes), wait(&pack, Wants::Stored));
        let verified = verified(&sample);
        fill.verified(&verified);
        assert_eq!(outcome(early), Some(Ok(())));
        assert_eq!(outcome(wait(&pack, Wants::Bytes)), Some(Ok(())));
        assert_eq!(outcome(wait(&pack, Wants::Stored)), None);
        assert!(!pack.units().is_ready(UNIT));
        fill.stored(verified);
        assert_eq!(outcome(early_stored), Some(Ok(())));
        assert!(pack.units().is_ready(UNIT) && matches!(pack.claim(UNIT, Wants::Stored), Claim::Ready));
    }

    #[test]
    fn a_failed_fill_says_so_and_the_next_asker_fills() {
        let (_, pack) = pack();
        let fill_one = fill(&pack);
        let (bytes, stored) = (wait(&pack, Wants::Bytes), wait(&pack, Wants::Stored));
        fill_one.failed(Errno::IO);
        assert_eq!(outcome(bytes), Some(Err(Unfilled::Failed(Errno::IO))));
        assert_eq!(outcome(stored), Some(Err(Unfilled::Failed(Errno::IO))));
        assert!(pack.claim_absent(UNIT).is_some());
    }

    #[test]
    fn a_dropped_fill_frees_those_who_wait() {
        let (_, pack) = pack();
        let fill_one = fill(&pack);
        let waiting = wait(&pack, Wants::Bytes);
        drop(fill_one);
        assert_eq!(outcome(waiting), Some(Err(Unfilled::Dropped)));
        drop(fill(&pack));
    }

    #[test]
    fn what_an_earlier_life_stored_stays_so_until_it_is_found_wrong() {
        let (sample, _) = pack();
        let mut saved = Saved::nothing(3);
        saved.present.insert(UNIT);
        let pack = sample.pack_with(&saved);
        assert!(!pack.units().is_ready(UNIT) && pack.claim_absent(UNIT).is_none(), "look-ahead leaves it alone");
        drop(fill(&pack));
        let mut checking = fill(&pack);
        assert!(checking.is_cached(), "a check that was cut short decides nothing");
        assert_eq!(pack.units().to_save().map(|map| map.present.count()), Some(0), "a unit being checked may turn out wrong");
        pack.units().not_saved();
        checking.not_cached();
        let map = pack.units().to_save().expect("a unit was lost");
        assert_eq!((map.generation, map.present.count()), (1, 0));
        drop(checking);
        assert!(!fill(&pack).is_cached());
    }

    #[test]
    fn maps_hold_what_is_stored_and_are_saved_when_that_changes() {
        let (sample, pack) = pack();
        assert_eq!(pack.units().to_save(), None);
        fill(&pack).stored(verified(&sample));
        let map = pack.units().to_save().expect("a unit was stored");
        assert!(map.present.has(UNIT) && !pack.units().has_changed());
        pack.units().not_saved();
        let map = pack.units().to_save().expect("it was not saved");
        pack.units().saved(map);
        assert!(pack.units().is_saved(UNIT) && !pack.units().all_durable());
        pack.units().lose(UNIT);
        assert!(!pack.units().is_ready(UNIT));
        let map = pack.units().to_save().expect("a unit was lost");
        assert_eq!((map.generation, map.present.count()), (2, 0));
    }

    #[test]
    fn a_map_being_saved_names_its_units_until_another_is_saved() {
        let (sample, pack) = pack();
        let units = pack.units();
        fill(&pack).stored(verified(&sample));
        assert!(!units.is_saved(UNIT));
        let map = units.to_save().expect("a unit was stored");
        assert!(units.is_saved(UNIT), "it may be on disk by now");
        assert!(map.present.has(UNIT));
        units.lose(UNIT);
        for attempt in 0..2 {
            units.not_saved();
            assert_eq!(units.to_save().expect("nothing was saved").present.count(), 0);
            assert!(units.is_saved(UNIT), "attempt {attempt} failed as well: the first may be there");
        }
        units.not_saved();
        let map = units.to_save().expect("nothing was saved");
        units.saved(map);
        assert!(!units.is_saved(UNIT));
    }

    #[test]
    fn a_map_saved_during_a_check_does_not_drop_the_unit_for_good() {
        let (sample, _) = pack();
        let mut saved = Saved::nothing(3);
        saved.present.insert(UNIT);
        for right in [true, false] {
            let pack = sample.pack_with(&saved);
            let checking = fill(&pack);
            pack.units().not_saved();
            let without = pack.units().to_save().expect("a unit may turn out wrong");
            pack.units().saved(without);
            if right {
                checking.stored(verified(&sample))
            } else {
                drop(checking)
            }
            let map = pack.units().to_save().expect("the unit is as it was");
            assert!(map.present.has(UNIT));
            pack.units().saved(map);
            drop(pack.claim(UNIT, Wants::Bytes));
            assert_eq!(pack.units().to_save(), None, "a check alone is nothing to save");
        }
    }

    #[test]
    fn a_failed_sync_loses_what_no_saved_map_names_and_what_is_being_written() {
        let (sample, pack) = pack();
        let units = pack.units();
        fill(&pack).stored(verified(&sample));
        let map = units.to_save().expect("a unit was stored");
        assert!(map.present.has(UNIT));
        units.lose_unsaved();
        assert!(!units.is_ready(UNIT) && !units.is_saved(UNIT), "the map was not written either");

        let written = fill(&pack);
        let waiting = wait(&pack, Wants::Stored);
        units.lose_unsaved();
        written.stored(verified(&sample));
        assert_eq!(outcome(waiting), Some(Err(Unfilled::Dropped)), "whoever waits tries again");
        assert!(!units.is_ready(UNIT));

        fill(&pack).stored(verified(&sample));
        let map = units.to_save().expect("a unit was stored");
        units.saved(map);
        units.lose_unsaved();
        assert!(units.is_ready(UNIT), "what was durable stays so");
    }

    #[test]
    fn what_an_earlier_life_stored_is_durable_and_yet_not_to_be_relied_on_unchecked() {
        let sample = Sample::mixed(2, 65_536);
        let mut saved = Saved::nothing(1);
        saved.present.insert(UnitIndex(0));
        let pack = sample.pack_with(&saved);
        assert!(!pack.units().all_durable());
        let mut bytes = Buffer::new(65_536);
        bytes.copy_from_slice(&sample.bytes);
        let Claim::Fill(check) = pack.claim(UnitIndex(0), Wants::Bytes) else { panic!("it is to be checked") };
        check.stored(Verified::check(pack.table(), UnitIndex(0), bytes).expect("the unit's own bytes"));
        assert!(pack.units().all_durable());
    }

    #[test]
    fn a_mark_is_taken_once_and_outlives_changes_of_state() {
        let (sample, pack) = pack();
        pack.units().mark(UNIT);
        fill(&pack).stored(verified(&sample));
        assert!(pack.units().is_ready(UNIT));
        assert!(pack.units().take_mark(UNIT) && !pack.units().take_mark(UNIT));
        assert!(pack.units().is_ready(UNIT));
    }
}
