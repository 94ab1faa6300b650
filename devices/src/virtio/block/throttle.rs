//! Limits of a disk's speed, shared by its queues.

use std::time::{Duration, Instant};

/// What a limit may save up while the disk is idle: this much time's worth.
const BURST: Duration = Duration::from_millis(100);

/// How fast a disk may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes a second, reads and writes together; not 0.
    pub bytes: Option<u64>,
    /// Requests a second; not 0.
    pub requests: Option<u64>,
}

/// A token bucket: requests begin while it is not in debt, and are paid for in full, so that
/// large ones are not held up for ever, but what follows them is.
#[derive(Debug)]
struct Bucket {
    /// Tokens a second.
    rate: f64,
    /// Negative: a debt.
    tokens: f64,
    last: Instant,
}

impl Bucket {
    fn new(rate: u64, now: Instant) -> Self {
        let rate = rate.max(1) as f64;
        Self {
            rate,
            tokens: rate * BURST.as_secs_f64(),
            last: now,
        }
    }

    /// How long the debt lasts.
    fn debt(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.last).as_secs_f64();
        self.last = now;
        self.tokens = (self.tokens + passed * self.rate).min(self.rate * BURST.as_secs_f64());
        // A nanosecond more, so that it is over then in spite of rounding.
        match self.tokens < 0.0 {
            true => Duration::try_from_secs_f64(-self.tokens / self.rate)
                .unwrap_or(Duration::MAX)
                .saturating_add(Duration::from_nanos(1)),
            false => Duration::ZERO,
        }
    }
}

/// The state of a disk's limits.
#[derive(Debug)]
pub(super) struct Throttle {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

impl Throttle {
    /// `None` if nothing is limited.
    pub(super) fn new(limits: Limits, now: Instant) -> Option<Self> {
        let bucket = |rate: Option<u64>| rate.map(|rate| Bucket::new(rate, now));
        (limits != Limits::default()).then(|| Self {
            bytes: bucket(limits.bytes),
            requests: bucket(limits.requests),
        })
    }

    /// How long the next request has to wait; zero if it may begin.
    pub(super) fn delay(&mut self, now: Instant) -> Duration {
        let buckets = [&mut self.bytes, &mut self.requests];
        let delays = buckets.into_iter().flatten().map(|bucket| bucket.debt(now));
        delays.max().unwrap_or_default()
    }

    /// A request of that many bytes begins.
    pub(super) fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.tokens -= bytes as f64;
        }
        if let Some(bucket) = &mut self.requests {
            bucket.tokens -= 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// How many requests of `bytes` begin in `time`, if there are always more.
    fn begun(limits: Limits, bytes: u64, time: Duration) -> u64 {
        let start = Instant::now();
        let mut throttle = Throttle::new(limits, start).unwrap();
        let (mut now, mut count) = (start, 0);
        while now < start + time {
            match throttle.delay(now) {
                Duration::ZERO => {
                    throttle.charge(bytes);
                    count += 1;
                }
                delay => now += delay,
            }
        }
        count
    }

    #[test]
    fn nothing_to_limit_is_no_throttle() {
        assert!(Throttle::new(Limits::default(), Instant::now()).is_none());
    }

    #[test]
    fn a_rate_is_kept_whatever_the_size_of_requests() {
        let requests = Limits {
            requests: Some(100),
            ..Limits::default()
        };
        // 1000 in ten seconds, a burst of 10 before, and one into debt.
        assert!((1010..=1012).contains(&begun(requests, 1 << 20, 10 * SECOND)));
        let bytes = Limits {
            bytes: Some(1 << 20),
            ..Limits::default()
        };
        for size in [512, 4096, 1 << 20, 8 << 20] {
            let moved = begun(bytes, size, 100 * SECOND) * size;
            let expected = 100 << 20;
            let most = expected + (1 << 20) / 10 + 2 * size;
            assert!((expected..=most).contains(&moved), "{size}: {moved}");
        }
    }

    #[test]
    fn the_slower_of_two_limits_holds() {
        let limits = Limits {
            bytes: Some(1 << 30),
            requests: Some(10),
        };
        assert!((101..=103).contains(&begun(limits, 512, 10 * SECOND)));
    }

    #[test]
    fn idle_time_is_saved_up_to_the_burst() {
        let start = Instant::now();
        let limits = Limits {
            requests: Some(1000),
            ..Limits::default()
        };
        let mut throttle = Throttle::new(limits, start).unwrap();
        let now = start + 3600 * SECOND;
        let mut burst = 0;
        while throttle.delay(now).is_zero() {
            throttle.charge(512);
            burst += 1;
        }
        assert_eq!(burst, 101);
        // The debt of one request lasts for a thousandth of a second, and not longer.
        let delay = throttle.delay(now);
        assert!(delay > Duration::from_micros(999) && delay < Duration::from_micros(1001));
        assert!(throttle.delay(now + delay).is_zero());
    }

    #[test]
    fn absurd_limits_do_no_harm() {
        let limits = Limits {
            bytes: Some(1),
            requests: Some(u64::MAX),
        };
        let now = Instant::now();
        let mut throttle = Throttle::new(limits, now).unwrap();
        throttle.charge(u64::MAX);
        assert!(throttle.delay(now) > 3600 * SECOND);
        assert!(
            throttle.delay(now - SECOND) > 3600 * SECOND,
            "a clock that goes back"
        );
    }
}
