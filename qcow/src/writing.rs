//! What a writer keeps beside the tables.

/// What a writer keeps beside the tables.
pub(crate) struct Writing {}
