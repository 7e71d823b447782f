//! A small pool of threads for work that may fail.

use std::sync::Mutex;
use std::thread;

use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// Does `work` on all `items`, at most `jobs` at a time, begun in order. Results are in the order of `items`. The first failure
/// cancels `stop`, a token that `work` should heed, and is the result.
pub fn in_parallel<T: Send, R: Send>(
    jobs: usize,
    items: Vec<T>,
    stop: &CancellationToken,
    work: impl Fn(T) -> Result<R, Failure> + Sync,
) -> Result<Vec<R>, Failure> {
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let threads = jobs.min(items.len());
    let queue = Mutex::new(items.into_iter().zip(&mut results));
    let failure: Mutex<Option<Failure>> = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    if stop.is_cancelled() {
                        failure.lock().expect("no panic while it is held").get_or_insert(Failure::Stopped);
                        return;
                    }
                    let next = queue.lock().expect("no panic while it is held").next();
                    let Some((item, slot)) = next else { return };
                    match work(item) {
                        Ok(result) => *slot = Some(result),
                        Err(error) => {
                            let mut failure = failure.lock().expect("no panic while it is held");
                            // "Stopped" is what a failure elsewhere makes of the others.
                            if failure.as_ref().is_none_or(|f| matches!(f, Failure::Stopped)) {
                                *failure = Some(error);
                            }
                            stop.cancel();
                            return;
                        }
                    }
                }
            });
        }
    });
    drop(queue);
    match failure.into_inner().expect("no thread panicked") {
        Some(failure) => Err(failure),
        None => Ok(results.into_iter().map(|r| r.expect("without a failure every item has its result")).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order() {
        for jobs in [1, 2, 8] {
            let doubled = in_parallel(jobs, (0..100).collect(), &CancellationToken::new(), |i: u32| Ok(2 * i)).unwrap();
            assert_eq!(doubled, (0..100).map(|i| 2 * i).collect::<Vec<_>>());
        }
        assert!(in_parallel(2, Vec::<u32>::new(), &CancellationToken::new(), Ok).unwrap().is_empty());
    }

    #[test]
    fn the_failure_is_reported_not_what_it_stopped() {
        let stop = CancellationToken::new();
        let result = in_parallel(4, (0..4).collect(), &stop, |i: u32| {
            if i == 3 {
                return Err::<(), _>(Failure::NoLayers { image: "i".to_owned() });
            }
            while !stop.is_cancelled() {
                std::thread::yield_now();
            }
            Err(Failure::Stopped)
        });
        assert!(matches!(result, Err(Failure::NoLayers { .. })), "{result:?}");
    }

    #[test]
    fn a_cancelled_token_stops_the_rest() {
        let stop = CancellationToken::new();
        let result = in_parallel(1, (0..4).collect(), &stop, |i: u32| {
            assert_eq!(i, 0);
            stop.cancel();
            Ok(())
        });
        assert!(matches!(result, Err(Failure::Stopped)), "{result:?}");
    }
}
