//! The structures that messages consist of, as bytes.

use super::{ErrorCode, Extent, Failure, Lease, MAX_NAME, Naming, Quantize, Release, Target};
use crate::wire::{Reader, WireError, Writer};

pub(super) const FLAG_NAMED: u32 = 1;
pub(super) const FLAG_REPLACE: u32 = 2;
const LEASE_FD: u32 = 1;
const LEASE_DATASET: u32 = 2;
const RELEASE_TAINTED: u64 = 1;

pub(crate) fn write_extent(w: &mut Writer<'_>, e: &Extent) {
    w.u64(e.segment).u64(e.generation).u64(e.offset).u64(e.length);
}

pub(crate) fn read_extent(r: &mut Reader<'_>) -> Result<Extent, WireError> {
    Ok(Extent {
        segment: r.u64("segment")?,
        generation: r.u64("generation")?,
        offset: r.u64("offset")?,
        length: r.u64("length")?,
    })
}

pub(super) fn write_lease(w: &mut Writer<'_>, lease: &Lease) {
    write_extent(w, &lease.extent);
    let flags = if lease.fd { LEASE_FD } else { 0 } | if lease.dataset { LEASE_DATASET } else { 0 };
    w.u64(lease.segment_size).u32(flags).u32(0);
}

pub(super) fn read_lease(r: &mut Reader<'_>) -> Result<Lease, WireError> {
    let extent = read_extent(r)?;
    let segment_size = r.u64("segment_size")?;
    let flags = r.u32("flags")?;
    r.u32("reserved")?;
    Ok(Lease { extent, segment_size, fd: flags & LEASE_FD != 0, dataset: flags & LEASE_DATASET != 0 })
}

pub(super) fn write_releases(w: &mut Writer<'_>, list: &[Release]) {
    for r in list {
        w.u64(r.segment).u64(r.generation).u64(if r.tainted { RELEASE_TAINTED } else { 0 });
    }
}

pub(super) fn read_releases(n: u32, tail: &mut Reader<'_>) -> Result<Vec<Release>, WireError> {
    let n = tail.count(u64::from(n), 24, "releases")?;
    (0..n)
        .map(|_| {
            Ok(Release {
                segment: tail.u64("segment")?,
                generation: tail.u64("generation")?,
                tainted: tail.u64("flags")? & RELEASE_TAINTED != 0,
            })
        })
        .collect()
}

pub(super) fn read_quantize(f: &mut Reader<'_>, tail: &mut Reader<'_>) -> Result<Quantize, WireError> {
    let descriptor = f.u64("descriptor")?;
    let ready = f.u32("ready")?;
    let timeout = f.u32("timeout")?;
    let flags = f.u32("flags")?;
    let releases = f.u32("releases")?;
    let digest = f.key("digest")?;
    let ring = f.u64("ring")?;
    let releases = read_releases(releases, tail)?;
    let named = match flags & FLAG_NAMED {
        0 => None,
        _ => Some(Naming { name: read_name(tail)?, replace: flags & FLAG_REPLACE != 0, digest }),
    };
    Ok(Quantize { descriptor, ready, timeout, named, releases, ring })
}

pub(super) fn read_target(f: &mut Reader<'_>, tail: &mut Reader<'_>) -> Result<Target, WireError> {
    let kind = f.u32("kind")?;
    f.u32("reserved")?;
    let ticket = f.u64("ticket")?;
    let secret = f.key("secret")?;
    match kind {
        0 => Ok(Target::Name(read_name(tail)?)),
        1 => Ok(Target::Ticket(ticket, secret)),
        2 => Ok(Target::Again(read_extent(f)?)),
        value => Err(WireError::Value { what: "kind", value: u64::from(value) }),
    }
}

pub(super) fn read_name(tail: &mut Reader<'_>) -> Result<String, WireError> {
    let name = tail.string("name")?;
    if name.is_empty() || name.len() > MAX_NAME || name.contains('\0') {
        return Err(WireError::Value { what: "length of name", value: name.len() as u64 });
    }
    Ok(name.to_owned())
}

pub(super) fn read_failure(f: &mut Reader<'_>, tail: &mut Reader<'_>) -> Result<Failure, WireError> {
    let code = f.u32("code")?;
    f.u32("reserved")?;
    let known = ErrorCode::ALL.into_iter().find(|c| *c as u32 == code);
    Ok(Failure {
        // A newer daemon may know more codes; to this client they are the daemon's own fault.
        code: known.unwrap_or(ErrorCode::Internal),
        row: f.u64("row")?,
        index: f.u64("index")?,
        count: f.u64("count")?,
        value: f.f64("value")?,
        message: tail.string("message")?.to_owned(),
        hint: tail.string("hint")?.to_owned(),
        column: tail.string("column")?.to_owned(),
    })
}
