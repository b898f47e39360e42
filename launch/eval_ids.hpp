#pragma once

#include <string>
#include <vector>

#include "launch/session.hpp"

namespace arcus {

/// `arcus eval PATH --ids FILE --logits OUT`: the logits of given token ids, for comparison with
/// other programs. FILE holds one text a line as decimal ids; OUT is an HDF5 file with the data set
/// `logits` [tokens, vocab] fp32, text after text, and `text_offsets` [texts + 1]. It appears whole
/// or not at all. Prints loss and perplexity of the next tokens. Collective.
ExitCode evaluate_ids(Session& session, const std::string& path,
                      const std::vector<std::string>& sets, const std::string& ids_file,
                      const std::string& out);

}  // namespace arcus
