#include "text_steps.h"

namespace doubleweave::tokenizer {

Regex read_pattern(const nlohmann::json& pattern) {
  if (pattern.contains("Regex")) {
    return Regex(pattern.at("Regex").get<std::string>());
  }
  return Regex(Regex::literal(pattern.at("String").get<std::string>()));
}

}  // namespace doubleweave::tokenizer
