//! A few threads that do requests with blocking calls, so that those that take long hold up none of
//! the others.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::execute::{Context, Executor};
use super::request::Operation;
use super::service::Setup;
use crate::threads::Kind;

/// A request that was done: its number, what it was, and how it went.
pub(super) type Done = (usize, Operation, io::Result<()>);

/// The threads of one queue. Dropping it waits for what they are at.
pub(super) struct Pool<'a> {
    setup: &'a Setup,
    most: usize,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// Signalled when `done` stops being empty.
    finished: EventFd,
}

#[derive(Default)]
struct State {
    todo: VecDeque<(usize, Operation)>,
    done: Vec<Done>,
    idle: usize,
    ended: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does requests until the pool ends.
    fn work(&self, context: &Context) {
        let mut executor = Executor::new(context);
        let mut state = self.state();
        while !state.ended {
            let Some((request, operation)) = state.todo.pop_front() else {
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            drop(state);
            let result = executor.execute(&operation);
            state = self.state();
            state.done.push((request, operation, result));
            if state.done.len() == 1 {
                // Read whenever it is waited for, the counter cannot be full.
                let _ = self.finished.write(1);
            }
        }
    }
}

impl<'a> Pool<'a> {
    /// At most that many threads, which are started when they are needed.
    pub(super) fn new(setup: &'a Setup, most: usize) -> io::Result<Self> {
        let shared = Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            finished: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        };
        Ok(Self {
            setup,
            most,
            shared: Arc::new(shared),
            threads: Vec::new(),
        })
    }

    /// Starts no thread beyond that many.
    pub(super) fn limit(&mut self, most: usize) {
        self.most = most;
    }

    /// Signalled when there is something for [`done`](Self::done) to tell.
    pub(super) fn event(&self) -> &EventFd {
        &self.shared.finished
    }

    /// Whether there is a thread, if need be one that is made now.
    pub(super) fn has_thread(&mut self) -> bool {
        !self.threads.is_empty() || self.add_thread()
    }

    /// Has a request done, or gives it back if there is no thread for it.
    pub(super) fn start(&mut self, request: usize, operation: Operation) -> Result<(), Operation> {
        let missing = {
            let state = self.shared.state();
            state.todo.len() >= state.idle && self.threads.len() < self.most
        };
        if missing && !self.add_thread() && self.threads.is_empty() {
            return Err(operation);
        }
        self.shared.state().todo.push_back((request, operation));
        self.shared.work.notify_one();
        Ok(())
    }

    fn add_thread(&mut self) -> bool {
        let Setup {
            threads,
            name,
            context,
            ..
        } = self.setup;
        let (shared, context) = (Arc::clone(&self.shared), context.clone());
        let work = Box::new(move || shared.work(&context));
        let thread = threads.spawn(Kind::Disk, name.clone(), work);
        let added = thread.is_ok();
        self.threads.extend(thread);
        added
    }

    /// Forgets the requests that no thread has come to, and tells their numbers.
    pub(super) fn cancel(&self) -> Vec<usize> {
        let todo = std::mem::take(&mut self.shared.state().todo);
        todo.into_iter().map(|(request, _)| request).collect()
    }

    /// Waits for no thread when it is dropped: they may wait for what never comes.
    pub(super) fn abandon(&mut self) {
        self.threads.clear();
    }

    /// Takes what was done since the last call.
    pub(super) fn done(&self, into: &mut Vec<Done>) {
        into.append(&mut self.shared.state().done);
    }
}

impl Drop for Pool<'_> {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join()
                && !std::thread::panicking()
            {
                // A bug there is a bug here: it is not to be hidden by a reset.
                std::panic::resume_unwind(panic);
            }
        }
    }
}
