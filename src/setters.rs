//! Methods that change one option of a struct. Structs of options are `#[non_exhaustive]`, so that a new option breaks no caller.
//! Such a struct cannot be written as a literal outside this crate, so callers need the methods.

/// Gives a struct of options one method per field. The method takes the struct, changes the field and returns the struct.
macro_rules! setters {
    ($type:ident $(<$life:lifetime>)? { $($field:ident: $value:ty),* $(,)? }) => {
        impl $(<$life>)? $type $(<$life>)? {
            $(
                #[doc = concat!("Returns these options with another [`", stringify!($field), "`](Self#structfield.", stringify!($field), ").")]
                #[must_use]
                pub fn $field(mut self, $field: $value) -> Self {
                    self.$field = $field;
                    self
                }
            )*
        }

        // If the list leaves out a field, this pattern does not compile.
        const _: fn($type) = |$type { $($field: _,)* }| ();
    };
}
pub(crate) use setters;
